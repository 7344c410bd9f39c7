"""Windows of any horizon and stride, cut from the store by one gather.

NumPy does the cutting: its small operations cost a third of torch's, and a batch of transitions is made of them.
"""

from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, from_numpy

from offline_cai.core import Batch, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError

ABOUT = np.dtype([("returns", np.float32), ("exists", np.bool_), ("terminal", np.bool_)], align=True)
"""Of a row: discounted return-to-go, whether it holds a step (False: its episode's last row), whether that step is a
true end."""


class Rows(NamedTuple):
    """Packed rows of episodes, one after the other, and what a window needs to know about each."""

    values: np.ndarray  # float32 [N, W], contiguous, as in `Trajectories.rows`
    end: np.ndarray  # int64 [N]  the last row of its episode
    about: np.ndarray  # ABOUT [N]
    pairs: np.ndarray  # [N-1] `values` again: each row and the one after it as one item

    @classmethod
    def of(cls, values: np.ndarray, end: np.ndarray, about: np.ndarray) -> Self:
        two = np.dtype(f"V{2 * values.strides[0]}")
        return cls(values, end, about, np.ndarray(len(values) - 1, two, values, 0, values.strides[:1]))


def about_rows(trajectories: Trajectories, discount: float) -> np.ndarray:
    """ABOUT [N], of the rows of a store."""
    about, last = np.empty(len(trajectories.rows), ABOUT), trajectories.offsets[1:] - 1
    about["returns"], about["exists"], about["terminal"] = trajectories.return_to_go(discount), True, False
    about["exists"][last], about["terminal"][last - 1] = False, trajectories.terminal
    return about


class Cut:
    """Cuts windows of `horizon` blocks of `stride` steps out of rows."""

    def __init__(self, spec: Spec, horizon: int, stride: int, discount: float) -> None:
        if horizon < 1 or stride < 1:
            raise UserError(f"a window of {horizon} x {stride} steps: horizon and stride have to be at least 1.")
        self.horizon, self.stride = horizon, stride
        self._obs, self._reward = spec.obs_width, spec.obs_width + spec.action_width  # columns of a row
        self._ahead = np.arange(horizon * stride + 1)
        self._powers = discount ** torch.arange(stride, dtype=torch.float32)

    def __call__(self, rows: Rows, first: np.ndarray, key: Tensor) -> Batch:
        """The windows whose first rows, which hold steps, are `first` [B], with their random keys [B]."""
        if self.horizon * self.stride == 1:
            return self._transitions(rows, first, key)
        k, o, r = self.stride, self._obs, self._reward
        index = first[:, None] + self._ahead
        np.minimum(index, rows.end.take(first)[:, None], out=index)
        x, about = rows.values.take(index, axis=0), rows.about.take(index)
        blocks = x[:, :-1].reshape(len(first), self.horizon, k, -1)
        about = about[:, :-1].reshape(len(first), self.horizon, k)
        if k == 1:
            reward = from_numpy(blocks[..., 0, r])
            valid, terminal = about["exists"][..., 0], about["terminal"][..., 0]
        else:
            reward = from_numpy(blocks[..., r]) @ self._powers
            terminal = np.any(about["terminal"], axis=-1)
            valid = np.all(about["exists"], axis=-1) | terminal
        return Batch(
            obs=from_numpy(x[:, ::k, :o]),
            action=from_numpy(blocks[..., o:r]),
            reward=reward,
            terminal=from_numpy(terminal),
            valid=from_numpy(valid),
            returns=from_numpy(about["returns"][..., 0]),
            log_prob=from_numpy(blocks[..., r + 1]) if rows.values.shape[1] > r + 1 else None,
            key=key,
        )

    def _transitions(self, rows: Rows, first: np.ndarray, key: Tensor) -> Batch:
        """Windows of one step: it and the row after it are copied as one item."""
        x, about = rows.pairs[first].view(np.float32).reshape(len(first), 2, -1), rows.about.take(first)[:, None]
        o, r = self._obs, self._reward
        return Batch(
            obs=from_numpy(x[:, :, :o]),
            action=from_numpy(x[:, :1, None, o:r]),
            reward=from_numpy(x[:, :1, r]),
            terminal=from_numpy(about["terminal"]),
            valid=from_numpy(about["exists"]),
            returns=from_numpy(about["returns"]),
            log_prob=from_numpy(x[:, :1, None, r + 1]) if rows.values.shape[1] > r + 1 else None,
            key=key,
        )


class Windows:
    """Views `trajectories` as windows of `horizon` blocks of `stride` steps.

    With `padding` a window may begin at any step and is continued past the end of its episode by the last state, zero
    actions and zero rewards; without, it has to fit. `episodes` restricts the windows to episodes with these numbers.

    Attributes:
        starts: int64 [M], the rows at which a window may begin.

    Raises:
        UserError: no episode is long enough for an unpadded window, or horizon or stride is below one.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        horizon: int,
        stride: int = 1,
        discount: float = 0.99,
        padding: bool = True,
        episodes: np.ndarray | None = None,
    ) -> None:
        self._cut = Cut(trajectories.spec, horizon, stride, discount)
        self.data, self.horizon, self.stride, self.discount = trajectories, horizon, stride, discount
        self.starts = trajectories.step_rows(episodes)
        if not padding:
            self.starts = self.starts[self.starts + horizon * stride <= trajectories.end[self.starts]]
        if not len(self.starts):
            raise UserError(
                f"no episode holds a window of {horizon} x {stride} steps: the longest has "
                f"{trajectories.lengths.max()}. Shorten the horizon or the stride, or allow padding."
            )
        about = about_rows(trajectories, discount)
        self._rows = Rows.of(np.ascontiguousarray(trajectories.rows), np.asarray(trajectories.end), about)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """First rows [n] of n windows, uniform over `starts`."""
        return self.starts[rng.integers(len(self.starts), size=n)]

    def gather(self, rows: np.ndarray, key: Tensor) -> Batch:
        """The windows that begin at `rows` [B], with their random keys [B]."""
        return self._cut(self._rows, rows, key)
