"""Where batches come from."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from offline_cai import seeding
from offline_cai.core import Algorithm, Batch, Explorer, Needs, Source, SourceState
from offline_cai.data.sampling import Sampler, Weighted
from offline_cai.data.segments import Segments
from offline_cai.data.trajectories import Trajectories, digests
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.training.experiment import Experiment
from offline_cai.training.online import ReplaySource, RolloutSource, Share


def build(
    experiment: Experiment, algorithm: Algorithm, data: Trajectories | None, accelerator: Accelerator, output: Path
) -> Source:
    """The source that the algorithm needs, for this process; what it gathers is kept in OUTPUT/replay.

    Raises:
        UserError: the experiment lacks the dataset or the environment that the algorithm learns from.
    """
    needs, size, seed = algorithm.needs, experiment.training.batch_size, experiment.seed
    digest = None if data is None or data.path is None else digests(data.path)["rows"]
    share = Share(accelerator.process_index, accelerator.num_processes, _joined(accelerator))
    if needs.source == "offline":
        if data is None:
            raise UserError(f"{experiment.algorithm} learns from a dataset: name one with dataset.")
        return OfflineSource(_sampler(needs, data), size, seed, share.rank, share.processes, digest)
    if experiment.environment is None:
        raise UserError(f"{experiment.algorithm} gathers its data itself: name an environment with environment.id.")
    assert isinstance(algorithm, Explorer), f"{experiment.algorithm} asks for a {needs.source} and cannot explore"
    kind = ReplaySource if needs.source == "replay" else RolloutSource
    if kind is RolloutSource and data is not None:
        raise UserError(f"{experiment.algorithm} learns from its own rollouts only: leave out the dataset.")
    return kind(algorithm, experiment.environment, size, seed, output / "replay", share, data, digest)


def _joined(accelerator: Accelerator) -> Callable[[np.ndarray], np.ndarray]:
    def gather(rows: np.ndarray) -> np.ndarray:
        if accelerator.num_processes == 1:
            return rows
        return accelerator.gather(torch.from_numpy(rows).to(accelerator.device)).cpu().numpy()

    return gather


def sample(experiment: Experiment, algorithm: Algorithm, data: Trajectories, count: int) -> Batch:
    """As many windows of the data beside those of the steps: always the same."""
    sampler = _sampler(algorithm.needs, data)
    items = sampler.draw(seeding.rng(experiment.seed, -1), count)
    return sampler.gather(items, seeding.keys(experiment.seed, -1, torch.arange(count)))


def _sampler(needs: Needs, data: Trajectories) -> Sampler:
    if needs.segments:
        return Segments(data, needs.horizon)
    windows = Windows(data, needs.horizon, needs.stride, needs.discount, needs.padding)
    return windows if needs.weigh is None else Weighted(windows, needs.weigh(data.returns))


class OfflineSource:
    """Windows of a fixed dataset. The batch of step k is a function of (seed, k) and has no other state.

    `rank` and `processes` take a slice of the same global batch, so that N processes see what one would. `data` is a
    checksum of the dataset: a resume on other data is refused.
    """

    seconds = 0.0

    def __init__(
        self, sampler: Sampler, batch_size: int, seed: int, rank: int = 0, processes: int = 1, data: str | None = None
    ) -> None:
        self.asked: Callable[[], bool] = lambda: False
        self._sampler, self._size, self._seed, self._data = sampler, batch_size, seed, data
        self._slice = slice(rank * batch_size // processes, (rank + 1) * batch_size // processes)
        self._positions = torch.arange(batch_size)[self._slice]

    def __call__(self, step: int) -> Batch:
        items = self._sampler.draw(seeding.rng(self._seed, step), self._size)
        return self._sampler.gather(items[self._slice], seeding.keys(self._seed, step, self._positions))

    def state(self) -> SourceState:
        return SourceState({"data": self._data}, {})

    def load(self, state: SourceState) -> None:
        if state.facts.get("data") != self._data:
            raise UserError("the dataset is not the one that this run was trained on: start a new run.")

    def metrics(self) -> dict[str, float]:
        return {}

    def prune(self, kept: Iterable[Mapping[str, Any]]) -> None:
        pass

    def close(self) -> None:
        pass
