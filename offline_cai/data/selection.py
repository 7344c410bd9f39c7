"""Which episodes of a store: filters and splits, as arrays of episode numbers that `Windows` takes."""

from collections.abc import Sequence

import numpy as np

from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError

Range = tuple[float | None, float | None]


def select(
    data: Trajectories,
    *,
    returns: Range = (None, None),
    length: Range = (None, None),
    top: float | None = None,
    terminal: bool | None = None,
    task: tuple[Sequence[int], Sequence[float], float] | None = None,
) -> np.ndarray:
    """Numbers of the episodes that meet every condition, int64, in order.

    Args:
        returns: undiscounted return at least the first and at most the second; None is no bound.
        length: steps, likewise.
        top: this share in (0, 1] of all episodes, those with the highest returns.
        terminal: that truly ended (True), or were cut by a time limit (False).
        task: (columns of the observation, values, radius): episodes whose first state lies that near to the values in
            those columns, for example a goal.

    Raises:
        UserError: no episode is left, or a share outside (0, 1].
    """
    if top is not None and not 0 < top <= 1:
        raise UserError(f"the top share of episodes is {top}; it has to be above 0 and at most 1.")
    keep = _within(data.returns, returns) & _within(data.lengths, length)
    if top is not None:
        best = np.argsort(-data.returns, kind="stable")[: max(1, round(top * data.num_episodes))]
        keep &= np.isin(np.arange(data.num_episodes), best)
    if terminal is not None:
        keep &= data.terminal == terminal
    if task is not None:
        columns, values, radius = task
        first = data.obs[data.offsets[:-1]][:, list(columns)]
        keep &= np.linalg.norm(first - np.asarray(values), axis=1) <= radius
    if not keep.any():
        raise UserError(
            f"no episode is left: returns {returns}, length {length}, top {top}, terminal {terminal}; the store has "
            f"returns {data.returns.min():.4g} to {data.returns.max():.4g} and lengths {data.lengths.min()} to "
            f"{data.lengths.max()}."
        )
    return np.flatnonzero(keep)


def split(episodes: np.ndarray, shares: Sequence[float], seed: int) -> list[np.ndarray]:
    """Episode numbers in disjoint random parts of these shares, which sum to one; each part in order.

    Raises:
        UserError: shares that do not sum to one, or a part that would be empty.
    """
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise UserError(f"shares {list(shares)} have to be positive and sum to one.")
    shuffled = np.random.default_rng(seed).permutation(episodes)
    cuts = np.rint(np.cumsum(shares)[:-1] * len(episodes)).astype(int)
    parts = [np.sort(part) for part in np.split(shuffled, cuts)]
    if not all(len(part) for part in parts):
        raise UserError(f"{len(episodes)} episodes cannot be split into {list(shares)}: a part would be empty.")
    return parts


def _within(values: np.ndarray, bounds: Range) -> np.ndarray:
    low, high = bounds
    return (values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high))
