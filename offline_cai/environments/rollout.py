"""Run a policy on vectorised environments and keep what happened."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from offline_cai import seeding
from offline_cai.core import Episode, Policy, Spec
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError


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


def rollout(
    envs: Environments,
    spec: Spec,
    policy: Policy,
    seed: int,
    *,
    episodes: int | None = None,
    steps: int | None = None,
    progress: Callable[[int], Any] = lambda steps: None,
) -> list[Episode]:
    """Run `policy` until every environment has done its share, in the order of environments.

    The share is a fixed quota of `episodes` per environment, so that short episodes are not favoured, or of `steps` per
    environment, whose last episode is cut (a time-out, not a true end). Episode j of environment i is reset with a seed
    that is a function of (seed, i, j) alone. `progress` is told the number of new steps.

    Raises:
        UserError: the policy gave actions of a wrong shape or that are not finite, or an environment failed.
    """
    if (episodes is None) == (steps is None):
        raise ValueError("give either episodes or steps: they are two ways to say when to stop.")
    count = envs.count
    done: list[list[Episode]] = [[] for _ in range(count)]
    taken = np.zeros(count, dtype=int)
    active = np.ones(count, dtype=bool)
    obs = starts(envs, seed)
    policy.reset(None)
    recorders = [_Recorder(row) for row in obs]
    while active.any():
        action, log_prob = policy.act(obs)
        check_action(action, count, spec)
        obs, reward, terminated, truncated = envs.step(action)
        ended = terminated | truncated
        progress(int(active.sum()))
        for i in np.flatnonzero(active):
            recorders[i].add(action[i], float(reward[i]), obs[i], None if log_prob is None else float(log_prob[i]))
            taken[i] += 1
            if ended[i] or taken[i] == steps:
                done[i].append(recorders[i].episode(bool(terminated[i])))
                active[i] = len(done[i]) < episodes if episodes is not None else taken[i] < (steps or 0)
        if ended.any():
            obs = envs.reset(episode_seeds(seed, [len(d) for d in done]), ended)
            policy.reset(ended)
            for i in np.flatnonzero(ended):
                recorders[i] = _Recorder(obs[i])
    return [episode for episodes_of_one in done for episode in episodes_of_one]


def starts(envs: Environments, seed: int) -> np.ndarray:
    """First observations [N, O] of episode 0 of each environment."""
    return envs.reset(episode_seeds(seed, [0] * envs.count))


def episode_seeds(seed: int, episodes: Sequence[int], first: int = 0) -> list[int]:
    """The seeds that environments, numbered from `first`, are reset with for the episodes of these numbers."""
    return [seeding.seed_of(seed, i, number) for i, number in enumerate(episodes, start=first)]


def check_action(action: np.ndarray, count: int, spec: Spec) -> None:
    """Raise a UserError if these are no raw actions [count, A]."""
    if action.shape != (count, spec.action_width):
        raise UserError(f"the policy gave actions of shape {action.shape}, not {(count, spec.action_width)}.")
    if not np.isfinite(action).all():
        raise UserError("the policy gave an action that is not finite: its weights or its input hold NaN.")
