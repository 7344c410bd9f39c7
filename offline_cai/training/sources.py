"""Where batches come from."""

import torch
from accelerate import Accelerator

from offline_cai import seeding
from offline_cai.core import Algorithm, Batch, Source, SourceState
from offline_cai.data.sampling import Sampler
from offline_cai.data.trajectories import Trajectories, digests
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.training.experiment import Experiment


def build(experiment: Experiment, algorithm: Algorithm, data: Trajectories, accelerator: Accelerator) -> Source:
    """The source that the algorithm needs, for this process."""
    needs, digest = algorithm.needs, None if data.path is None else digests(data.path)["rows"]
    windows = Windows(data, needs.horizon, needs.stride, needs.discount, needs.padding)
    rank, count = accelerator.process_index, accelerator.num_processes
    return OfflineSource(windows, experiment.training.batch_size, experiment.seed, rank, count, digest)


class OfflineSource:
    """Windows of a fixed dataset. The batch of step k is a function of (seed, k) and has no other state.

    `rank` and `processes` take a slice of the same global batch, so that N processes see what one would. `data` is a
    checksum of the dataset: a resume on other data is refused.
    """

    seconds = 0.0

    def __init__(
        self, sampler: Sampler, batch_size: int, seed: int, rank: int = 0, processes: int = 1, data: str | None = None
    ) -> None:
        self._sampler, self._size, self._seed, self._data = sampler, batch_size, seed, data
        self._slice = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)

    def __call__(self, step: int) -> Batch:
        items = self._sampler.draw(seeding.rng(self._seed, step), self._size)
        keys = seeding.keys(self._seed, step, torch.arange(self._size)[self._slice])
        return self._sampler.gather(items[self._slice], keys)

    def state(self) -> SourceState:
        return SourceState({"data": self._data}, {})

    def load(self, state: SourceState) -> None:
        if state.facts.get("data") != self._data:
            raise UserError("the dataset is not the one that this run was trained on: start a new run.")

    def close(self) -> None:
        pass
