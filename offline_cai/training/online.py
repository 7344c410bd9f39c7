"""Sources that gather their data: environments stepped by the algorithm's own exploration.

Every process steps its share of the environments, and the new rows of all are put together after each step. So each
process holds the whole replay, draws the same global batch from it and takes its slice, as with a fixed dataset. The
price is one small exchange for each step of the environments, and memory for the replay in every process.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch

from offline_cai import seeding
from offline_cai.core import Batch, Discrete, Explorer, SourceState, Spec
from offline_cai.data import replay as replays
from offline_cai.data.replay import Replay, ReplayWindows
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Cut
from offline_cai.environments.make import make
from offline_cai.environments.rollout import check_action, episode_seeds
from offline_cai.environments.vector import EnvironmentFault, Environments
from offline_cai.errors import UserError
from offline_cai.interrupts import Asked
from offline_cai.spaces import require_same_spec

ACTING = 1  # the stream of keys for acting, apart from those for batches
FINE, FAULT, STOP = 0.0, 1.0, 2.0  # what a process tells the others after each step of its environments


@dataclass(frozen=True)
class Simulation:
    """The environment that an online algorithm gathers its data in, and how much between updates."""

    id: str
    """Gymnasium id, version included."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of gymnasium.make."""
    wrapper: str | None = None
    """One of our environment wrappers around it."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the wrapper."""
    count: int = 1
    """Environments side by side, over all processes."""
    workers: int = 0
    """Worker processes for them, in each training process; 0: none. Only with workers a hang or a crash is survived."""
    timeout: float = 60.0
    """Seconds that an environment in a worker may take for one step or reset."""
    random_steps: int = 0
    """Steps of each environment with uniform random actions before the first update."""
    steps: int = 1
    """Steps of each environment at a time; on-policy algorithms get them as one batch. Where all episodes last as long,
    take whole ones: environments begin together, so a part of an episode is the same part in all of them."""
    updates: int = 1
    """Updates after each time."""
    capacity: int = 1_000_000
    """Rows (steps, and one more for each episode) that a replay keeps; on-policy algorithms keep their last batch."""

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("workers", 0), ("random_steps", 0), ("steps", 1), ("updates", 1)):
            if getattr(self, name) < least:
                raise UserError(f"environment.{name} is {getattr(self, name)}; it has to be at least {least}.")
        if not self.timeout > 0:
            raise UserError(f"environment.timeout is {self.timeout}; it has to be positive.")

    def make(self) -> gym.Env:
        return make(self.id, self.kwargs, self.wrapper, **self.options)


class Share(NamedTuple):
    """The part of one process among several; `gather` joins the rows of all of them, in the order of their ranks."""

    rank: int = 0
    processes: int = 1
    gather: Callable[[np.ndarray], np.ndarray] = np.asarray

    def of(self, count: int) -> slice:
        return slice(self.rank * count // self.processes, (self.rank + 1) * count // self.processes)


class OnlineSource(ABC):
    """Environments, the replay that they fill, and when. What it does is a function of (seed, time) and the weights.

    Episode j of environment i is reset with a seed made of (seed, i, j), and the draws of an action are keyed by (seed,
    time, i). The batch of update k is due after `random_steps + steps * (1 + k // updates)` steps of each environment;
    a source that was stopped on the way there goes on from where it was.

    Args:
        algorithm: acts by `explore`, with the weights that it has at that moment.
        batch_size: windows per batch, over all processes; rollouts come whole.
        folder: for the replay's segments.
        data: checksum of the dataset, None without one: a resume on other data is refused.

    Raises:
        UserError: environments that cannot be shared by the processes or are not what the algorithm was made for.
        EnvironmentFault: an environment failed. The source's state is that of the last complete step of all.
    """

    seconds = 0.0

    def __init__(
        self,
        algorithm: Explorer,
        simulation: Simulation,
        batch_size: int,
        seed: int,
        folder: Path,
        share: Share,
        dataset: Trajectories | None = None,
        data: str | None = None,
    ) -> None:
        c = simulation
        if c.count % share.processes:
            raise UserError(
                f"environment.count is {c.count}, and {share.processes} processes cannot share that evenly: take a "
                "multiple."
            )
        self.asked: Callable[[], bool] = lambda: False
        self._algorithm, self._config, self._seed, self._folder = algorithm, c, seed, folder
        self._acting = seeding.key(seed, ACTING)
        self._size, self._share, self._own, self._data = batch_size, share, share.of(c.count), data
        self._replay = Replay(algorithm.spec, c.count, self._capacity, algorithm.needs.discount, dataset)
        count = self._own.stop - self._own.start
        self._envs = Environments(c.make, count, c.workers, c.timeout, first=self._own.start)
        require_same_spec(algorithm.spec, self._envs.spec)
        self._time, self._episodes = 0, np.zeros(c.count, dtype=np.int64)
        self._running, self._returns = np.zeros(c.count), np.full(c.count, np.nan)
        self._obs = share.gather(self._envs.reset(self._seeds(self._episodes)))
        self._replay.begin(self._obs)

    def __call__(self, step: int) -> Batch:
        c = self._config
        while self._time < c.random_steps + c.steps * (1 + step // c.updates):
            self._advance()
        return self._batch(step)

    @property
    @abstractmethod
    def _capacity(self) -> int:
        """Rows that the replay keeps."""

    @abstractmethod
    def _batch(self, step: int) -> Batch:
        """The batch of an update, now that all that it needs is there."""

    def metrics(self) -> dict[str, float]:
        """Steps and episodes of all environments, and the mean return of the last episode of each."""
        counts = {"environment_steps": float(self._time * self._config.count), "episodes": float(self._episodes.sum())}
        done = self._returns[~np.isnan(self._returns)]
        return counts | ({"episode_return": float(done.mean())} if len(done) else {})

    def close(self) -> None:
        self._envs.close()

    # A step of all environments --------------------------------------------------------------------------------------

    def _advance(self) -> None:
        action, log_prob = self._act()
        fault, began = None, time.perf_counter()
        try:
            told = np.full(len(action), STOP if self.asked() else FINE)
            own = np.column_stack([action, log_prob, *self._step(action), told])
        except EnvironmentFault as error:
            fault = error
            own = np.full((len(action), action.shape[1] + 2 * self._obs.shape[1] + 5), FAULT)
        self.seconds += time.perf_counter() - began
        rows = self._share.gather(own)
        if (rows[:, -1] == FAULT).any():
            raise fault or EnvironmentFault("an environment of another process failed, and that process names it.")
        o, a = self._obs.shape[1], action.shape[1]
        cuts = np.cumsum([a, 1, 1, o, 2, o])
        taken, log_prob, reward, obs, ends, restart, _ = np.split(rows, cuts, axis=1)
        ends, ended = ends.astype(bool), ends.any(axis=1)
        self._replay.add(taken, reward[:, 0], log_prob[:, 0], obs, ends[:, 0], ends[:, 1], restart)
        self._running += reward[:, 0]
        self._returns[ended], self._running[ended] = self._running[ended], 0.0
        self._episodes += ended
        self._obs, self._time = restart, self._time + 1
        if (rows[:, -1] == STOP).any():
            raise Asked

    def _act(self) -> tuple[np.ndarray, np.ndarray]:
        """Actions [n, A] of this process's environments, rounded as the replay keeps them, and log-probabilities."""
        spec, obs = self._algorithm.spec, self._obs[self._own]
        numbers = torch.arange(self._own.start, self._own.stop)
        key = seeding.keys(self._acting, self._time, numbers)
        with torch.no_grad():
            random = self._time < self._config.random_steps
            action, log_prob = _uniform(spec, key) if random else self._algorithm.explore(obs, key)
        check_action(action, len(obs), spec)
        return action.astype(np.float32), np.full(len(obs), np.nan) if log_prob is None else log_prob

    def _step(self, action: np.ndarray) -> tuple[np.ndarray, ...]:
        """Reward, next observation, ends, and the observation to go on from."""
        obs, reward, terminated, truncated = self._envs.step(action)
        ended, restart = terminated | truncated, obs
        if ended.any():
            episodes = self._episodes.copy()
            episodes[self._own] += ended
            restart = self._envs.reset(self._seeds(episodes), ended)
        return reward, obs, terminated, truncated, restart

    def _seeds(self, episodes: np.ndarray) -> list[int]:
        return episode_seeds(self._seed, episodes[self._own].tolist(), self._own.start)

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def state(self) -> SourceState:
        if self._share.rank:
            return SourceState({}, {})  # the first process holds all of it, and writes
        facts = {"data": self._data, "time": self._time, "episodes": self._episodes.tolist()}
        arrays = {"obs": self._obs, "running": self._running, "returns": self._returns}
        tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return SourceState({**facts, "replay": self._replay.save(self._folder)}, tensors)

    def load(self, state: SourceState) -> None:
        """Take up a state: read the replay, and rebuild each environment by replaying its episode's actions.

        Raises:
            UserError: other data, a damaged segment, or an environment that does not do the same again.
        """
        facts, tensors = state.facts, state.tensors
        if facts["data"] != self._data:
            raise UserError("the dataset is not the one that this run was trained on: start a new run.")
        self._time, self._episodes = int(facts["time"]), np.array(facts["episodes"])
        self._obs, self._running, self._returns = (tensors[n].numpy().copy() for n in ("obs", "running", "returns"))
        self._replay.load(self._folder, facts["replay"], self._obs)
        numbers, seeds = range(self._own.start, self._own.stop), self._seeds(self._episodes)
        episodes = [self._replay.current(i) for i in numbers]
        rebuilt = self._envs.rebuild(seeds, [action for _, action in episodes])
        for i, seed, (obs, action), seen in zip(numbers, seeds, episodes, rebuilt, strict=True):
            same = (seen.astype(np.float32) == obs).all(axis=1)
            same[-1] &= np.array_equal(seen[-1], self._obs[i])
            if not same.all():
                raise UserError(
                    f"environment {i} ({self._envs.name}) does not do the same again: from seed {seed} on, the "
                    f"{len(action)} actions of its episode lead to another observation at step {np.argmin(same)}. A "
                    "resume needs an environment that its seed and its actions decide, on the same versions of the "
                    "simulator: mend it, or start a new run."
                )

    def prune(self, kept: Iterable[Mapping[str, Any]]) -> None:
        if not self._share.rank:
            replays.prune(self._folder, [facts["replay"] for facts in kept])


class ReplaySource(OnlineSource):
    """Windows drawn uniformly from the latest rows, and from a dataset if there is one."""

    @property
    def _capacity(self) -> int:
        return self._config.capacity

    @cached_property
    def _positions(self) -> torch.Tensor:
        return torch.arange(self._size)[self._share.of(self._size)]

    @cached_property
    def _windows(self) -> ReplayWindows:
        needs = self._algorithm.needs
        return ReplayWindows(self._replay, needs.horizon, needs.stride, needs.padding)

    def _batch(self, step: int) -> Batch:
        items = self._windows.draw(seeding.rng(self._seed, step), self._size)[self._share.of(self._size)]
        return self._windows.gather(items, seeding.keys(self._seed, step, self._positions))


class RolloutSource(OnlineSource):
    """The last `steps` of each environment: all that was gathered with the latest weights.

    The batch has one window for each piece of an episode, as long as the longest piece; blocks past the end of a piece
    are not `valid`. A process gets the pieces of its own environments.
    """

    @property
    def _capacity(self) -> int:
        return (2 * self._config.steps + 1) * self._config.count  # each step may be an episode, and has two rows then

    def _batch(self, step: int) -> Batch:
        first, lane = self._replay.latest(self._config.steps)
        longest = int((self._replay.rows.end[first] - first).max())
        keys = seeding.keys(self._seed, step, torch.arange(len(first)))
        own = (lane >= self._own.start) & (lane < self._own.stop)
        cut = Cut(self._algorithm.spec, longest, 1, self._replay.discount)
        return cut(self._replay.rows, first[own], keys[torch.from_numpy(own)])


def _uniform(spec: Spec, key: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Uniform actions, and their log-probabilities (in [-1, 1] space, or of the choices)."""
    u = seeding.uniform(key, (spec.action_width,)).numpy()
    low, high = np.array(spec.action.low), np.array(spec.action.high)
    if isinstance(spec.action, Discrete):
        return np.floor(low + u * (high - low + 1)), np.full(len(u), -np.log(spec.action.n).sum())
    return low + u * (high - low), np.full(len(u), -len(low) * np.log(2.0))
