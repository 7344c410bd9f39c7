import functools
import os
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from offline_cai.core import Episode, Spec
from offline_cai.environments.make import env_spec
from offline_cai.environments.rollout import Care, rollout
from offline_cai.environments.vector import EnvironmentFault, Environments
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


def test_without_the_quota_short_episodes_are_favoured_and_with_it_none_are() -> None:
    """Lengths are uniform on 2..6, with mean 4 and variance 2. The first episodes to finish are short ones."""
    count, share = 400, 4
    lengths = np.array([len(e.reward) for e in run(count, episodes=share)[0]]).reshape(count, share)
    assert abs(lengths.mean() - 4) < 3 * np.sqrt(2 / lengths.size)
    order = lengths.cumsum(1).ravel().argsort(kind="stable")  # as they finish, side by side
    first = lengths.ravel()[order][:count]
    assert first.mean() - 4 < -4 * np.sqrt(2 / count), (
        "the first 400 to finish, as an evaluation without a quota counts"
    )


class Faulty(Count):
    """Fails at `step` of an episode as long as the file `tries` holds fewer than `times` lines."""

    def __init__(self, tries: Path, step: int, times: int, how: str) -> None:
        self._tries, self._step, self._times, self._how = tries, step, times, how

    def step(self, action):  # type: ignore[no-untyped-def]
        tried = len(self._tries.read_text().splitlines()) if self._tries.exists() else 0
        if self.t == self._step and self.length == 6 and tried < self._times:
            self._tries.write_text("tried\n" * (tried + 1))
            if self._how == "died":
                os._exit(7)
            if self._how == "hung":
                time.sleep(60)
            raise RuntimeError("the simulator is unstable")
        return super().step(action)


class Counting:
    """Acts by what it sees and by how often it was asked: what a planner does that is half way through a plan."""

    def __init__(self) -> None:
        self.t = np.zeros(3)

    def reset(self, done: np.ndarray | None = None) -> None:
        self.t[slice(None) if done is None else done] = 0

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, None]:
        self.t += 1
        return np.tanh(self.t * 0.1 + obs[:, 1] * 0.01)[:, None], None


def same(one: list[Episode], other: list[Episode]) -> bool:
    return all(
        np.array_equal(a.obs, b.obs) and np.array_equal(a.reward, b.reward) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("how", "workers"), [("raised", 0), ("raised", 2), ("died", 2), ("hung", 2)])
def test_an_episode_is_repeated_after_a_fault_and_nothing_else_changes(how: str, workers: int, tmp_path: Path) -> None:
    undisturbed = rollout(Environments(Count, 3), env_spec(Count()), Counting(), 0, episodes=4)
    maker, care = functools.partial(Faulty, tmp_path / "tries", 4, 1, how), Care()
    envs = Environments(maker, 3, workers, timeout=2.0 if how == "hung" else 60.0)
    assert same(undisturbed, rollout(envs, env_spec(Count()), Counting(), 0, episodes=4, care=care))
    words = {"raised": "raised RuntimeError: the simulator is unstable", "died": "exit code 7", "hung": "no answer"}[
        how
    ]
    place = "in worker" if workers else "in the training process"
    assert len(care.repeated) == 1 and words in care.repeated[0] and place in care.repeated[0]
    assert "at step 5 of the episode with seed" in care.repeated[0]
    envs.close()


def test_a_fault_that_comes_again_ends_the_rollout_and_is_named(tmp_path: Path) -> None:
    for times, care, tries in ((1, None, "a"), (2, Care(), "b")):
        envs = Environments(functools.partial(Faulty, tmp_path / tries, 4, times, "raised"), 3)
        with pytest.raises(
            EnvironmentFault, match=r"environment \d .* raised RuntimeError: .* at step 5 of the episode"
        ):
            rollout(envs, env_spec(Count()), Counting(), 0, episodes=4, care=care)


class Forgetful(Faulty):
    """Its observations have randomness that its seed does not determine."""

    def step(self, action):  # type: ignore[no-untyped-def]
        obs, *rest = super().step(action)
        return obs + np.float32(np.random.default_rng().random()), *rest


def test_an_environment_that_cannot_be_rebuilt_is_said(tmp_path: Path) -> None:
    envs = Environments(functools.partial(Forgetful, tmp_path / "tries", 4, 1, "raised"), 3)
    with pytest.raises(UserError, match="gave other observations for the same seed and actions"):
        rollout(envs, env_spec(Count()), Counting(), 0, episodes=4, care=Care())


def test_an_episode_that_takes_too_long_is_cut_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one second a step: of six steps, four are done."""
    clock = iter(range(10_000))
    monkeypatch.setattr("offline_cai.environments.rollout.time.monotonic", lambda: float(next(clock)))
    care = Care(seconds=4.5)
    episodes = rollout(Environments(Count, 1), env_spec(Count()), Constant(np.array([0.5])), 0, episodes=12, care=care)
    long = [number for number, e in enumerate(episodes) if e.obs[0, 1] > 5]
    assert care.cut == [(0, number) for number in long] and long
    assert all(len(episodes[number].reward) == 5 and not episodes[number].terminal for number in long)
    assert all(e.terminal for number, e in enumerate(episodes) if number not in long)
