"""Run a policy on vectorised environments and keep what happened."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from offline_cai import seeding
from offline_cai.core import Episode, Policy, Spec
from offline_cai.environments.vector import EnvironmentFault, Environments, Steps
from offline_cai.errors import UserError

_T = TypeVar("_T")


class _Recorder:
    """The episode in progress of one environment."""

    def __init__(self, obs: np.ndarray) -> None:
        self.obs, self.action, self.reward, self.log_prob = [obs], [], [], []  # type: ignore[var-annotated]

    def add(self, action: np.ndarray, reward: float, obs: np.ndarray, log_prob: float | None) -> None:
        self.action.append(action)
        self.reward.append(reward)
        self.obs.append(obs)
        if log_prob is not None:
            self.log_prob.append(log_prob)

    def episode(self, terminal: bool) -> Episode:
        log_prob = np.array(self.log_prob) if self.log_prob else None
        return Episode(np.stack(self.obs), np.stack(self.action), np.array(self.reward), terminal, log_prob)


@dataclass
class Care:
    """What is done about episodes that fail or take too long, and a record of it.

    An episode in whose environment something fails is repeated once, from its start: environments are made anew and
    rebuilt from seeds and actions, so that all others go on as if nothing had happened. If it fails again, so does the
    rollout. An episode that takes too long is cut, which is no true end.
    """

    seconds: float | None = None
    """Wall time that an episode may take."""
    repeated: list[str] = field(default_factory=list)
    """The faults after which an episode was repeated: environment, worker, step, seed and what happened."""
    cut: list[tuple[int, int]] = field(default_factory=list)
    """The episodes that took too long: environment and number."""


def rollout(
    envs: Environments,
    spec: Spec,
    policy: Policy,
    seed: int,
    *,
    episodes: int | None = None,
    steps: int | None = None,
    progress: Callable[[int], Any] = lambda steps: None,
    finished: Callable[[Episode], Any] = lambda episode: None,
    care: Care | None = None,
) -> list[Episode]:
    """Run `policy` until every environment has done its share, in the order of environments.

    The share is a fixed quota of `episodes` per environment, so that short episodes are not favoured, or of `steps` per
    environment, whose last episode is cut (a time-out, not a true end). Episode j of environment i is reset with a seed
    that is a function of (seed, i, j) alone. `progress` is told the number of new steps, `finished` each episode.
    Without `care` a fault ends the rollout.

    Raises:
        UserError: the policy gave actions of a wrong shape or that are not finite, or an environment failed.
    """
    if (episodes is None) == (steps is None):
        raise ValueError("give either episodes or steps: they are two ways to say when to stop.")
    count = envs.count
    done: list[list[Episode]] = [[] for _ in range(count)]
    taken = np.zeros(count, dtype=int)
    active = np.ones(count, dtype=bool)
    running = _Running(envs, care)
    obs = running.reset(episode_seeds(seed, [0] * count), active)
    policy.reset(None)
    while active.any():
        action, log_prob = policy.act(obs)
        check_action(action, count, spec)
        obs, reward, terminated, truncated = running.step(action)
        late = running.late() & active
        ended = terminated | truncated | late
        progress(int(active.sum()))
        for i in np.flatnonzero(active):
            recorder = running.recorders[i]
            recorder.add(action[i], float(reward[i]), obs[i], None if log_prob is None else float(log_prob[i]))
            taken[i] += 1
            if ended[i] or taken[i] == steps:
                if care is not None and late[i] and not (terminated[i] or truncated[i]):
                    care.cut.append((int(i), len(done[i])))
                done[i].append(recorder.episode(bool(terminated[i])))
                finished(done[i][-1])
                active[i] = len(done[i]) < episodes if episodes is not None else taken[i] < (steps or 0)
        if ended.any():
            obs = running.reset(episode_seeds(seed, [len(d) for d in done]), ended)
            policy.reset(ended)
    return [episode for episodes_of_one in done for episode in episodes_of_one]


class _Running:
    """The episodes in progress, which survive a fault if that is cared for."""

    def __init__(self, envs: Environments, care: Care | None) -> None:
        self._envs, self._care = envs, care
        self.recorders: list[_Recorder] = []
        self._seeds = [0] * envs.count
        self._began = np.zeros(envs.count)
        self._failed: set[int] = set()

    def reset(self, seeds: Sequence[int], which: np.ndarray) -> np.ndarray:
        """Begin the episodes with these seeds in the environments `which` [N] bool; their observations [N, O]."""
        obs = self._surviving(lambda: self._envs.reset(seeds, which), which)
        self.recorders = self.recorders or [_Recorder(row) for row in obs]
        for i in np.flatnonzero(which).tolist():
            self.recorders[i], self._seeds[i], self._began[i] = _Recorder(obs[i]), seeds[i], time.monotonic()
        return obs

    def step(self, action: np.ndarray) -> Steps:
        return self._surviving(lambda: self._envs.step(action), np.zeros(self._envs.count, dtype=bool))

    def late(self) -> np.ndarray:
        """[N] bool: the episode takes longer than it may."""
        if self._care is None or self._care.seconds is None:
            return np.zeros(self._envs.count, dtype=bool)
        return time.monotonic() - self._began > self._care.seconds

    def _surviving(self, call: Callable[[], _T], fresh: np.ndarray) -> _T:
        """What `call` gives, called again after a fault with everything where it was; `fresh` ones begin anew in it."""
        while True:
            try:
                return call()
            except EnvironmentFault as fault:
                if self._care is None or fault.seed is None or fault.seed in self._failed:
                    raise
                self._failed.add(fault.seed)
                self._care.repeated.append(str(fault))
                self._go_back(fresh)

    def _go_back(self, fresh: np.ndarray) -> None:
        self._envs.restart()
        if not self.recorders:
            return
        past = [[] if new else recorder.action for recorder, new in zip(self.recorders, fresh, strict=True)]
        for i, rows in enumerate(self._envs.rebuild(self._seeds, past)):
            if not fresh[i] and not np.array_equal(rows, self.recorders[i].obs):
                raise UserError(
                    f"environment {i} gave other observations for the same seed and actions: it holds randomness of "
                    "its own, and its episode cannot be repeated after a fault in another."
                )


def episode_seeds(seed: int, episodes: Sequence[int], first: int = 0) -> list[int]:
    """The seeds that environments, numbered from `first`, are reset with for the episodes of these numbers."""
    return [seeding.seed_of(seed, i, number) for i, number in enumerate(episodes, start=first)]


def check_action(action: np.ndarray, count: int, spec: Spec) -> None:
    """Raise a UserError if these are no raw actions [count, A]."""
    if action.shape != (count, spec.action_width):
        raise UserError(f"the policy gave actions of shape {action.shape}, not {(count, spec.action_width)}.")
    if not np.isfinite(action).all():
        raise UserError("the policy gave an action that is not finite: its weights or its input hold NaN.")
