import gymnasium as gym
import numpy as np
import pytest

from offline_cai.core import Episode, Spec
from offline_cai.environments.make import env_spec
from offline_cai.environments.rollout import rollout
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError


class Count(gym.Env):
    """The observation counts steps; episodes of environment-dependent length end truly at `length`."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict | None = None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.t, self.length = 0, int(self.np_random.integers(2, 7))
        return np.array([0, self.length], dtype=np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.t += 1
        return np.array([self.t, self.length], dtype=np.float32), float(action[0]), self.t >= self.length, False, {}


class Constant:
    """Acts with a constant and counts how often it was reset."""

    def __init__(self, value: np.ndarray) -> None:
        self.value, self.resets = value, []  # type: ignore[var-annotated]

    def reset(self, done: np.ndarray | None = None) -> None:
        self.resets.append(None if done is None else done.copy())

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.tile(self.value, (len(obs), 1)), np.arange(len(obs), dtype=float)


def run(count: int, **share: int) -> tuple[list[Episode], Constant]:
    envs = Environments(Count, count)
    policy = Constant(np.array([0.5]))
    return rollout(envs, env_spec(Count()), policy, seed=0, **share), policy


def test_every_environment_runs_its_quota_and_episodes_are_whole() -> None:
    episodes, policy = run(3, episodes=4)
    assert len(episodes) == 12
    for e in episodes:
        assert e.obs[:, 0].tolist() == list(range(len(e.reward) + 1)), "rows count up: no step is lost or mixed"
        assert len(e.reward) == e.obs[0, 1] and e.terminal and (e.reward == 0.5).all()
    assert all((e.log_prob == 0).all() for e in episodes[:4]) and all((e.log_prob == 2).all() for e in episodes[8:])
    assert policy.resets[0] is None and sum(int(r.sum()) for r in policy.resets[1:]) >= 12


def test_a_share_of_steps_is_exact_and_its_cut_is_no_true_end() -> None:
    episodes, _ = run(2, steps=25)
    assert sum(len(e.reward) for e in episodes) == 50
    ends = [e for e in episodes if not e.terminal]
    assert len(ends) <= 2 and all(len(e.reward) < e.obs[0, 1] for e in ends)


def test_an_environment_s_episodes_do_not_depend_on_its_neighbours() -> None:
    alone, _ = run(1, episodes=5)
    among, _ = run(3, episodes=5)
    assert [len(e.reward) for e in alone] == [len(e.reward) for e in among[:5]]


def test_wrong_actions_are_refused(spec: Spec) -> None:
    for value, word in ((np.array([0.1, 0.2]), "shape"), (np.array([np.nan]), "not finite")):
        with pytest.raises(UserError, match=word):
            rollout(Environments(Count, 2), env_spec(Count()), Constant(value), 0, episodes=1)
    with pytest.raises(ValueError, match="either episodes or steps"):
        rollout(Environments(Count, 2), env_spec(Count()), Constant(np.array([0.0])), 0)


def test_progress_counts_every_step() -> None:
    told: list[int] = []
    rollout(Environments(Count, 2), env_spec(Count()), Constant(np.array([0.0])), 0, steps=10, progress=told.append)
    assert sum(told) == 20
