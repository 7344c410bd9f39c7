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
    actions and zero rewards; without, it has to fit.

    Raises:
        UserError: no episode is long enough for an unpadded window.
    """

    def __init__(
        self, trajectories: Trajectories, horizon: int, stride: int = 1, discount: float = 0.99, padding: bool = True
    ) -> None:
        self.data, self.horizon, self.stride, self.discount = trajectories, horizon, stride, discount
        self._end = trajectories.episode_end()
        self._ends_true = np.repeat(trajectories.terminal, np.diff(trajectories.offsets))
        self._to_go = trajectories.return_to_go(discount)
        rows = trajectories.step_rows
        self.starts = rows if padding else rows[rows + horizon * stride <= self._end[rows]]
        if not len(self.starts):
            raise UserError(
                f"no episode holds a window of {horizon} x {stride} steps: the longest has "
                f"{trajectories.lengths.max()}. Shorten the horizon or the stride, or allow padding."
            )

    def gather(self, rows: np.ndarray, key: Tensor) -> Batch:
        """The windows that begin at `rows` [B], with their random keys [B]."""
        data, k, horizon = self.data, self.stride, self.horizon
        end = self._end[rows][:, None]
        at = np.minimum(rows[:, None] + k * np.arange(horizon + 1), end)
        begin, stop = at[:, :-1], rows[:, None] + k * np.arange(1, horizon + 1)
        steps = np.minimum((rows[:, None] + k * np.arange(horizon))[..., None] + np.arange(k), end[..., None])
        terminal = self._ends_true[rows][:, None] & (begin < end) & (end <= stop)
        reward = (data.reward[steps] * self.discount ** np.arange(k, dtype=np.float32)).sum(-1)
        return Batch(
            obs=torch.from_numpy(data.obs[at]),
            action=torch.from_numpy(data.action[steps]),
            reward=torch.from_numpy(reward),
            terminal=torch.from_numpy(terminal),
            valid=torch.from_numpy((stop <= end) | terminal),
            returns=torch.from_numpy(self._to_go[begin]),
            log_prob=None if data.log_prob is None else torch.from_numpy(data.log_prob[steps]),
            key=key,
        )
