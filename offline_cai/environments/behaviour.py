"""Scripted policies that collect data or serve as references."""

from collections import deque

import numpy as np

from offline_cai import seeding
from offline_cai.core import Spec
from offline_cai.environments.maze2d import Maze


class RandomPolicy:
    """Uniform actions within the bounds."""

    def __init__(self, spec: Spec, seed: int) -> None:
        self._low, self._high = np.array(spec.action.low), np.array(spec.action.high)
        self._rng = seeding.rng(seed)

    def reset(self, done: np.ndarray | None = None) -> None:
        pass

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        action = self._rng.uniform(self._low, self._high, size=(len(obs), len(self._low)))
        return action, np.full(len(obs), -len(self._low) * np.log(2.0))


class MazeController:
    """The controller behind D4RL's maze2d data: grid search over the maze's cells, then a PD controller with noise.

    action = kp (waypoint - position) - kd velocity + N(0, noise^2), clipped. Waypoints are the centres of the cells on
    a shortest path, each moved by up to `jitter`; the next one is taken within `switch` of the current; the last is
    the goal itself. Positions in metres.
    """

    def __init__(
        self,
        spec: Spec,
        maze: Maze,
        seed: int,
        kp: float = 10.0,
        kd: float = 1.0,
        noise: float = 0.5,
        jitter: float = 0.1,
        switch: float = 0.1,
    ) -> None:
        self._maze, self._kp, self._kd, self._noise, self._jitter, self._switch = maze, kp, kd, noise, jitter, switch
        self._state, self._goal = spec.columns("observation"), spec.columns("desired_goal")
        self._low, self._high = np.array(spec.action.low), np.array(spec.action.high)
        self._rng = seeding.rng(seed)
        self._paths: list[deque[np.ndarray]] = []
        self._goals: np.ndarray | None = None

    def reset(self, done: np.ndarray | None = None) -> None:
        if done is None or self._goals is None:
            self._goals = None
        else:
            self._goals[done] = np.nan

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, None]:
        state, goal = obs[:, self._state], obs[:, self._goal]
        if self._goals is None:
            self._paths, self._goals = [deque() for _ in obs], np.full_like(goal, np.nan)
        target = np.empty_like(goal)
        for i in range(len(obs)):
            if not np.array_equal(self._goals[i], goal[i]):
                self._paths[i], self._goals[i] = self._search(state[i, :2], goal[i]), goal[i]
            path = self._paths[i]
            if len(path) > 1 and np.hypot(*(state[i, :2] - path[0])) < self._switch:
                path.popleft()
            target[i] = path[0]
        action = self._kp * (target - state[:, :2]) - self._kd * state[:, 2:4]
        action += self._noise * self._rng.normal(size=action.shape)
        return np.clip(action, self._low, self._high), None

    def _search(self, position: np.ndarray, goal: np.ndarray) -> deque[np.ndarray]:
        """Jittered cell centres from `position` to `goal`, both (x, y); breadth-first over free cells."""
        start, end = self._maze.cell(position), self._maze.cell(goal)
        towards = {end: end}
        queue = deque([end])
        while queue and start not in towards:
            row, column = queue.popleft()
            for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if cell not in towards and not self._maze.walls[cell]:
                    towards[cell] = (row, column)
                    queue.append(cell)
        path: deque[np.ndarray] = deque()
        while start != end and start in towards:
            start = towards[start]
            path.append(self._maze.position(start) + self._rng.uniform(-self._jitter, self._jitter, size=2))
        if path:
            path.pop()
        path.append(goal.copy())
        return path
