"""Where batches come from."""

from typing import Any

import torch

from offline_cai import seeding
from offline_cai.core import Batch
from offline_cai.data.sampling import Sampler
from offline_cai.errors import UserError


class OfflineSource:
    """Windows of a fixed dataset. The batch of step k is a function of (seed, k) and has no other state.

    `rank` and `processes` take a slice of the same global batch, so that N processes see what one would. `data` is a
    checksum of the dataset: a resume on other data is refused.
    """

    def __init__(
        self, sampler: Sampler, batch_size: int, seed: int, rank: int = 0, processes: int = 1, data: str | None = None
    ) -> None:
        self._sampler, self._size, self._seed, self._data = sampler, batch_size, seed, data
        share = batch_size // processes
        self._slice = slice(rank * share, (rank + 1) * share)

    def __call__(self, step: int) -> Batch:
        items = self._sampler.draw(seeding.rng(self._seed, step), self._size)
        keys = seeding.keys(self._seed, step, torch.arange(self._size)[self._slice])
        return self._sampler.gather(items[self._slice], keys)

    def state(self) -> dict[str, Any]:
        return {"data": self._data}

    def load(self, state: dict[str, Any]) -> None:
        if state.get("data") != self._data:
            raise UserError("the dataset is not the one that this run was trained on: start a new run.")

    def close(self) -> None:
        pass
