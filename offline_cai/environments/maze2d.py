"""D4RL's maze2d evaluation protocol (Fu et al. 2020) on Gymnasium-Robotics' point mazes."""

from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from offline_cai.errors import UserError


@dataclass(frozen=True)
class Maze:
    """The cells of a maze and where they lie: row r, column c has its centre at (c - cx, cy - r) * size."""

    walls: np.ndarray  # [rows, columns] bool
    size: float

    @classmethod
    def of(cls, env: gym.Env) -> "Maze":
        maze: Any = getattr(env.unwrapped, "maze", None)
        if maze is None:
            raise UserError(f"{env} has no maze; this works on the PointMaze environments only.")
        return cls(np.array([[cell == 1 for cell in row] for row in maze.maze_map]), float(maze.maze_size_scaling))

    @property
    def _centre(self) -> np.ndarray:
        return (np.array(self.walls.shape) - 1) / 2

    def position(self, cell: tuple[int, int] | np.ndarray) -> np.ndarray:
        """Centre (x, y) in metres of a cell (row, column)."""
        row, column = np.asarray(cell) - self._centre
        return np.array([column, -row]) * self.size

    def cell(self, position: np.ndarray) -> tuple[int, int]:
        """The cell (row, column) that a position (x, y) lies in."""
        x, y = np.asarray(position) / self.size
        row, column = np.rint(self._centre + np.array([-y, x])).astype(int)
        return int(row), int(column)

    def blocked(self, positions: np.ndarray) -> np.ndarray:
        """Whether each of the positions [L, 2] lies in a wall or outside the maze, bool [L]."""
        x, y = np.asarray(positions).T / self.size
        cells = np.rint(self._centre + np.stack([-y, x], axis=1)).astype(int)
        inside = ((cells >= 0) & (cells < self.walls.shape)).all(1)
        row, column = np.where(inside[:, None], cells, 0).T
        return ~inside | self.walls[row, column]

    @property
    def free(self) -> list[tuple[int, int]]:
        return [(int(row), int(column)) for row, column in np.argwhere(~self.walls)]


class Maze2DProtocol(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """Fixed exact goal; start in any free cell +-0.1 with velocity noise 0.1; reward 1 within `radius`; no early end.

    Without a `goal` each episode has one of its own: the centre of any free cell but that of the start. Put it around a
    point maze made with `continuing_task=True` and the protocol's number of steps. The differences that it removes: the
    environment's own noise on goal and start (+-0.25), its start at rest, its radius of 0.45.
    """

    def __init__(self, env: gym.Env, goal: tuple[int, int] | None = None, radius: float = 0.5) -> None:
        goal = None if goal is None else (int(goal[0]), int(goal[1]))
        gym.utils.RecordConstructorArgs.__init__(self, goal=goal, radius=radius)
        super().__init__(env)
        self.goal_cell, self.radius = goal, float(radius)
        self.maze = Maze.of(env)
        if self.goal_cell is not None and self.goal_cell not in self.maze.free:
            raise UserError(f"the goal {self.goal_cell} is no free cell of the maze; those are {self.maze.free}.")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        base: Any = self.env.unwrapped
        base.position_noise_range = 0.0
        _, info = self.env.reset(seed=seed, options={"goal_cell": np.array(self.goal_cell or self.maze.free[0])})
        cell = self.maze.free[base.np_random.integers(len(self.maze.free))]
        position = self.maze.position(cell) + base.np_random.uniform(-0.1, 0.1, size=2)
        velocity = base.np_random.normal(size=2) * 0.1
        if self.goal_cell is None:
            others = [other for other in self.maze.free if other != cell]
            base.goal = self.maze.position(others[base.np_random.integers(len(others))])
            base.update_target_site_pos()
        base.point_env.set_state(position, velocity)
        obs = base._get_obs(np.concatenate([position, velocity]))
        return obs, {**info, "success": self._reached(obs)}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, _, truncated, info = self.env.step(action)
        reached = self._reached(obs)
        return obs, float(reached), False, truncated, {**info, "success": reached}

    def _reached(self, obs: dict[str, np.ndarray]) -> bool:
        return bool(np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"]) <= self.radius)
