"""Windows of any horizon and stride, cut from the store by one gather."""

import numpy as np
import torch
from torch import Tensor

from offline_cai.core import Batch
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError


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
        if horizon < 1 or stride < 1:
            raise UserError(f"a window of {horizon} x {stride} steps: horizon and stride have to be at least 1.")
        self.data, self.horizon, self.stride, self.discount = trajectories, horizon, stride, discount
        self.starts = trajectories.step_rows(episodes)
        if not padding:
            self.starts = self.starts[self.starts + horizon * stride <= trajectories.end[self.starts]]
        if not len(self.starts):
            raise UserError(
                f"no episode holds a window of {horizon} x {stride} steps: the longest has "
                f"{trajectories.lengths.max()}. Shorten the horizon or the stride, or allow padding."
            )
        self._rows, self._end = torch.from_numpy(trajectories.rows), torch.from_numpy(trajectories.end)
        self._true_end = torch.from_numpy(np.repeat(trajectories.terminal, np.diff(trajectories.offsets)))
        self._to_go = torch.from_numpy(trajectories.return_to_go(discount))
        self._ahead = torch.arange(horizon * stride + 1)
        self._powers = discount ** torch.arange(stride, dtype=torch.float32)

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """First rows [n] of n windows, uniform over `starts`."""
        return self.starts[rng.integers(len(self.starts), size=n)]

    def gather(self, rows: np.ndarray, key: Tensor) -> Batch:
        """The windows that begin at `rows` [B], with their random keys [B]."""
        k, o, a = self.stride, self.data.spec.obs_width, self.data.spec.obs_width + self.data.spec.action_width
        row = torch.from_numpy(rows)
        end, true_end = self._end.index_select(0, row)[:, None], self._true_end.index_select(0, row)[:, None]
        at = row[:, None] + self._ahead
        stop = at[:, k::k]
        if self.horizon * k == 1:  # a step and its next row are always inside the episode
            index, begin, terminal = at, row, true_end & (end == stop)
            valid = torch.ones_like(terminal)
        else:
            index = torch.minimum(at, end)
            begin = index[:, :-1:k].reshape(-1)
            terminal = true_end & (end <= stop) & (end > at[:, :-1:k])
            valid = terminal | (end >= stop)
        x = self._rows.index_select(0, index.view(-1)).view(*index.shape, -1)
        blocks = x[:, :-1].unflatten(1, (self.horizon, k))
        return Batch(
            obs=x[:, ::k, :o],
            action=blocks[..., o:a],
            reward=blocks[..., 0, a] if k == 1 else blocks[..., a] @ self._powers,
            terminal=terminal,
            valid=valid,
            returns=self._to_go.index_select(0, begin).view(stop.shape),
            log_prob=blocks[..., a + 1] if x.shape[-1] > a + 1 else None,
            key=key,
        )
