"""Scripted policies that collect data or serve as references, and noise around any policy."""

from collections import deque
from typing import Literal

import numpy as np
import torch

from offline_cai import seeding
from offline_cai.core import Discrete, Policy, Spec
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import UserError


class SlotNoise:
    """Rows of `width` draws for each environment and time: functions of (seed, environment, time) alone.

    Time counts the calls since `restart`. `stream` separates the noises of one seed.
    """

    _BLOCK = 256  # times drawn at once, from one key: less work per draw

    def __init__(self, seed: int, width: int, law: Literal["normal", "uniform"], stream: int = 0) -> None:
        self._seed, self._width, self._law, self._stream = seed, width, law, stream
        self.restart()

    def restart(self) -> None:
        self._time, self._block = 0, np.empty((0, 0, self._width))

    def __call__(self, count: int) -> np.ndarray:
        """The draws [count, width] of the next time."""
        block, row = divmod(self._time, self._BLOCK)
        if row == 0 or len(self._block) != count:
            keys = seeding.keys(self._seed, block, torch.arange(count))
            draw = seeding.normal if self._law == "normal" else seeding.uniform
            self._block = draw(keys, (self._BLOCK, self._width), self._stream).numpy()
        self._time += 1
        return self._block[:, row]


class Noisy:
    """Another policy with noise on its actions in [-1, 1] space, clipped there.

    `gaussian` is the standard deviation of what is added to each component; with probability `epsilon` the whole action
    is uniform instead. The log-probability is None: clipping after the sum leaves no simple density.
    """

    def __init__(self, policy: Policy, spec: Spec, seed: int, gaussian: float = 0.0, epsilon: float = 0.0) -> None:
        if gaussian < 0 or not 0 <= epsilon <= 1:
            raise UserError(
                f"gaussian is {gaussian} and epsilon {epsilon}; they have to be at least 0, epsilon at most 1."
            )
        self._policy, self._spec, self._gaussian, self._epsilon = policy, spec, gaussian, epsilon
        self._normal = SlotNoise(seed, spec.action_width, "normal", stream=1)
        self._uniform = SlotNoise(seed, 1 + spec.action_width, "uniform", stream=2)

    def reset(self, done: np.ndarray | None = None) -> None:
        if done is None:
            self._normal.restart()
            self._uniform.restart()
        self._policy.reset(done)

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, None]:
        raw, _ = self._policy.act(obs)
        unit = self._spec.to_unit(torch.as_tensor(raw, dtype=torch.float64)).numpy()
        unit = unit + self._gaussian * self._normal(len(obs))
        uniform = self._uniform(len(obs))
        unit = np.where(uniform[:, :1] < self._epsilon, 2 * uniform[:, 1:] - 1, unit)
        return self._spec.to_raw(torch.from_numpy(unit)).numpy(), None


class RandomPolicy:
    """Uniform actions: within the bounds, or among the choices."""

    def __init__(self, spec: Spec, seed: int) -> None:
        self._low, self._high = np.array(spec.action.low), np.array(spec.action.high)
        self._choices = spec.action.n if isinstance(spec.action, Discrete) else None
        self._rng = seeding.rng(seed)

    def reset(self, done: np.ndarray | None = None) -> None:
        pass

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(obs), len(self._low))
        if self._choices is not None:
            choice = self._rng.integers(self._low, self._high, size=shape, endpoint=True)
            return choice.astype(np.float64), np.full(len(obs), -np.log(self._choices).sum())
        return self._rng.uniform(self._low, self._high, size=shape), np.full(len(obs), -len(self._low) * np.log(2.0))


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
        self._low, self._high = np.array(spec.box.low), np.array(spec.box.high)
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
