"""From planned rows to actions: upsampling in time and a PD controller."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from offline_cai.errors import UserError

GRAIN = 1 / 32
"""Spacing of a pursued path's points, as a share of the lookahead."""
NEAR, CHECKED = 4, 16
"""The point that is pursued at least, and the places that are looked at on the way to one."""


@dataclass(frozen=True)
class Tracker:
    """Follows planned states: action = kp (position* - position) + kd (velocity* - velocity), one step ahead, clipped.

    Every policy that is compared with a planner uses the planner's own tracker, so that a difference in score is one of
    plans.
    """

    position: tuple[int, ...] = (0, 1)
    """Columns of the planned state that hold positions."""
    velocity: tuple[int, ...] = (2, 3)
    """Columns of the planned state that hold velocities, in the same order."""
    kp: float = 10.0
    """Action per metre of position error."""
    kd: float = 4.0
    """Action per metre per second of velocity error."""

    def __post_init__(self) -> None:
        if len(self.position) != len(self.velocity):
            raise UserError("the tracker needs one velocity column for each position column.")
        if not np.isfinite([self.kp, self.kd]).all():
            raise UserError(f"the tracker's gains are {self.kp} and {self.kd}; they have to be finite.")

    @property
    def columns(self) -> tuple[int, ...]:
        return (*self.position, *self.velocity)

    def states(self, rows: np.ndarray, stride: int, dt: float) -> np.ndarray:
        """Planned rows [N, R, O'], one every `stride` steps of `dt` seconds, to desired states [N, L, 2d] at each step.

        Cubic Hermite interpolation through positions and velocities, and its derivative; L = (R - 1) stride + 1.
        """
        position, velocity = rows[..., list(self.position)], rows[..., list(self.velocity)]
        if stride == 1:
            return np.concatenate([position, velocity], axis=-1)
        span = stride * dt
        s = np.arange(stride)[:, None] / stride  # [k, 1], fraction of the way to the next row
        p0, p1 = position[:, :-1, None], position[:, 1:, None]
        v0, v1 = velocity[:, :-1, None] * span, velocity[:, 1:, None] * span
        p = (
            (2 * s**3 - 3 * s**2 + 1) * p0
            + (s**3 - 2 * s**2 + s) * v0
            + (3 * s**2 - 2 * s**3) * p1
            + (s**3 - s**2) * v1
        )
        v = (6 * s**2 - 6 * s) * (p0 - p1) + (3 * s**2 - 4 * s + 1) * v0 + (3 * s**2 - 2 * s) * v1
        dense = np.concatenate([p, v / span], axis=-1)
        last = np.concatenate([position[:, -1:], velocity[:, -1:]], axis=-1)
        return np.concatenate([dense.reshape(len(rows), -1, dense.shape[-1]), last], axis=1)

    def action(self, desired: np.ndarray, state: np.ndarray) -> np.ndarray:
        """Unclipped actions [N, d] towards desired states [N, 2d] from selected observations [N, O']."""
        d = len(self.position)
        position, velocity = state[:, list(self.position)], state[:, list(self.velocity)]
        return self.kp * (desired[:, :d] - position) + self.kd * (desired[:, d:] - velocity)


@dataclass(frozen=True)
class Pursuit:
    """Pursues a path without a timetable: action = kp (point ahead - position) - kd velocity, clipped.

    The point is `lookahead` further along the path than the nearest one, so a plan's own slow speed does not matter;
    or as far as the straight way there is clear, where something says which places are.
    """

    position: tuple[int, ...] = (0, 1)
    """Columns of a plan's row, and of the state (planner.state), that hold positions."""
    velocity: tuple[int, ...] = (2, 3)
    """Columns of the state that hold velocities, in the same order."""
    lookahead: float = 1.1
    """Metres along the path."""
    kp: float = 10.0
    """Action per metre to the point ahead."""
    kd: float = 1.0
    """Action per metre per second."""

    def __post_init__(self) -> None:
        if len(self.position) != len(self.velocity):
            raise UserError("the pursuit needs one velocity column for each position column.")
        if not 0 < self.lookahead < float("inf") or not np.isfinite([self.kp, self.kd]).all():
            raise UserError(f"the pursuit's lookahead is {self.lookahead}; it has to be positive, and gains finite.")

    @property
    def columns(self) -> tuple[int, ...]:
        return (*self.position, *self.velocity)

    def path(self, rows: np.ndarray) -> np.ndarray:
        """Planned rows [R, O'] to points [L, d] along their path, GRAIN lookaheads apart."""
        along = self._along(rows)
        even = np.append(np.arange(0, along[-1], GRAIN * self.lookahead), along[-1])
        return np.stack([np.interp(even, along, column) for column in rows[:, list(self.position)].T], axis=1)

    def _along(self, rows: np.ndarray) -> np.ndarray:
        """How far along the path each row lies, [R]."""
        step = np.diff(rows[:, list(self.position)], axis=0)
        return np.concatenate([[0.0], np.linalg.norm(step, axis=1).cumsum()])

    def progress(self, rows: np.ndarray, at: int) -> tuple[float, float]:
        """The point of the rows' path with that number: the row, between two, that it lies at, and the share behind."""
        along = self._along(rows)
        share = min(at * GRAIN * self.lookahead / max(along[-1], 1e-9), 1.0)
        return float(np.interp(share * along[-1], along, np.arange(len(rows)))), share

    def advance(self, path: np.ndarray, at: int, state: np.ndarray) -> int:
        """The number of the nearest point to a state [O'], among those up to a lookahead and a half after `at`."""
        ahead = path[at : at + int(1.5 / GRAIN)]
        return at + int(np.linalg.norm(ahead - state[list(self.position)], axis=1).argmin())

    def action(
        self,
        path: np.ndarray,
        at: int,
        state: np.ndarray,
        clear: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> np.ndarray:
        """The unclipped action [d] at a state [O'] whose nearest point is number `at`.

        `clear` tells of places [..., d] whether one may be there, [...] bool.
        """
        here, ahead = state[list(self.position)], path[at + 1 : at + 1 + round(1 / GRAIN)]
        if not len(ahead):
            ahead = path[-1:]
        target = ahead[-1] if clear is None else ahead[self._in_sight(here, ahead, clear)]
        return self.kp * (target - here) - self.kd * state[list(self.velocity)]

    @staticmethod
    def _in_sight(here: np.ndarray, ahead: np.ndarray, clear: Callable[[np.ndarray], np.ndarray]) -> int:
        """The number of the furthest of the points [L, d] that a clear straight line leads to; NEAR where none does."""
        share = np.linspace(0, 1, CHECKED + 1)[1:, None, None]
        seen = np.flatnonzero(clear(here + share * (ahead - here)).all(0))
        return max(int(seen[-1]) if len(seen) else 0, min(NEAR, len(ahead) - 1))
