"""Segments of episodes, resampled to one number of rows: plans that end when they arrive, whatever time that takes."""

import numpy as np
import torch
from torch import Tensor

from offline_cai.core import Batch
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError


class Segments:
    """Pieces of one episode each, from a uniform step to its episode's end or to a uniform later step: a `Sampler`.

    A batch of them has obs [B, rows, O], linear between the steps, and `span` [B]: the steps from the first row to the
    last. Actions are those of the steps that the rows lie in; a segment earns no reward of its own.

    Args:
        to_end: probability of going on to the episode's end.
        least: steps that a segment has at least.

    Raises:
        UserError: no episode is that long, fewer than two rows, or a probability outside [0, 1].
    """

    def __init__(self, trajectories: Trajectories, rows: int, to_end: float = 0.4, least: int = 8) -> None:
        if rows < 2 or least < 1 or not 0 <= to_end <= 1:
            raise UserError(f"segments need two rows or more ({rows}), one step or more ({least}), to_end in [0, 1].")
        self.data, self.rows, self._to_end, self._least = trajectories, rows, to_end, least
        starts = trajectories.step_rows()
        self.starts = starts[trajectories.end[starts] - starts >= least]
        if not len(self.starts):
            raise UserError(
                f"no episode has {least} steps, which a segment needs: the longest has {trajectories.lengths.max()}."
            )

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """First and last rows [n, 2] of n segments."""
        first = self.starts[rng.integers(len(self.starts), size=n)]
        end = self.data.end[first]
        later = first + self._least + (rng.random(n) * (end - first - self._least + 1)).astype(np.int64)
        return np.stack([first, np.where(rng.random(n) < self._to_end, end, np.minimum(later, end))], axis=1)

    def gather(self, items: np.ndarray, key: Tensor) -> Batch:
        first, last = items.T
        at = first[:, None] + np.linspace(0, 1, self.rows) * (last - first)[:, None]
        step = np.minimum(at.astype(np.int64), last[:, None] - 1)
        part = (at - step)[..., None].astype(np.float32)
        width, table = self.data.spec.obs_width, self.data.rows
        here = table[step]
        obs = (1 - part) * here[..., :width] + part * table[step + 1, :width]
        action = torch.from_numpy(here[:, :-1, None, width : width + self.data.spec.action_width].copy())
        flat = torch.zeros(len(items), self.rows - 1)
        none = torch.zeros(flat.shape, dtype=torch.bool)
        span = torch.from_numpy((last - first).astype(np.float32))
        return Batch(torch.from_numpy(obs), action, flat, none, ~none, flat, None, key, span)
