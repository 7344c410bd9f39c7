import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from offline_cai.environments.make import make
from offline_cai.environments.vector import EnvironmentFault, Environments
from offline_cai.errors import UserError

HOPPER, MAZE = (functools.partial(make, name) for name in ("Hopper-v5", "PointMaze_UMaze-v3"))


@pytest.fixture(scope="module")
def soak() -> Iterator:  # type: ignore[type-arg]
    """eval/soak_environments.py, whose faults and tally are the long form of this."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
    import soak_environments

    yield soak_environments
    sys.path.pop(0)


def steps_of(envs: Environments, seeds: list[int], count: int) -> list[np.ndarray]:
    """Observations, rewards and ends of random steps; environments that end begin anew."""
    rng, out = np.random.default_rng(0), [envs.reset(seeds)]
    for t in range(count):
        action = rng.uniform(-1, 1, (envs.count, envs.spec.action_width)).astype(np.float32)
        obs, reward, terminated, truncated = envs.step(action)
        out += [obs, reward, terminated, truncated]
        ended = terminated | truncated
        if ended.any():
            out.append(envs.reset([seed + 10 * t for seed in seeds], ended))
    return out


@pytest.mark.parametrize("maker", [HOPPER, MAZE])
def test_workers_change_nothing(maker: functools.partial) -> None:
    here, there = Environments(maker, 3), Environments(maker, 3, workers=2)
    for a, b in zip(steps_of(here, [1, 2, 3], 60), steps_of(there, [1, 2, 3], 60), strict=True):
        assert np.array_equal(a, b)
    here.close(), there.close()


def test_rows_are_those_of_each_environment_alone() -> None:
    envs, alone = Environments(MAZE, 2), MAZE()
    row = envs.reset([5, 6])[1]
    obs, _ = alone.reset(seed=6)
    for _ in range(3):
        assert np.array_equal(row, gym.spaces.flatten(alone.observation_space, obs))
        row = envs.step(np.full((2, 2), 0.5, dtype=np.float32)).obs[1]
        obs = alone.step(np.full(2, 0.5, dtype=np.float32))[0]
    envs.close(), alone.close()


def test_choices_are_taken_as_they_are() -> None:
    envs, alone = Environments(functools.partial(make, "CartPole-v1"), 2), make("CartPole-v1")
    envs.reset([5, 6]), alone.reset(seed=6)
    for choice in (1, 1, 0):
        assert np.array_equal(envs.step(np.array([[0.0], [choice]])).obs[1], alone.step(choice)[0])
    envs.close(), alone.close()


def test_a_mask_resets_some_and_leaves_the_others() -> None:
    envs = Environments(HOPPER, 3)
    first = envs.reset([1, 2, 3])
    moved = envs.step(np.ones((3, 3), dtype=np.float32)).obs
    obs = envs.reset([1, 2, 3], np.array([False, True, False]))
    assert np.array_equal(obs[1], first[1]) and np.array_equal(obs[[0, 2]], moved[[0, 2]])
    envs.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_environment_is_rebuilt_from_its_seed_and_actions(workers: int) -> None:
    rng = np.random.default_rng(0)
    actions = [rng.uniform(-1, 1, (length, 3)).astype(np.float32) for length in (30, 0, 12)]
    first, again = Environments(HOPPER, 3), Environments(HOPPER, 3, workers)
    first.reset([1, 2, 3])
    for t in range(12):
        seen = first.step(np.stack([a[t] if t < len(a) else np.zeros(3, np.float32) for a in actions])).obs
    rebuilt = again.rebuild([1, 2, 3], actions)
    assert [obs.shape for obs in rebuilt] == [(31, 11), (1, 11), (13, 11)]
    assert np.array_equal(rebuilt[0][12], seen[0]) and np.array_equal(rebuilt[2][12], seen[2])
    rebuilt_on, _ = again.step(np.ones((3, 3), dtype=np.float32))[:2]
    first.rebuild([1, 2, 3], actions)
    assert np.array_equal(rebuilt_on, first.step(np.ones((3, 3), dtype=np.float32)).obs)
    first.close(), again.close()


# Faults --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "environment", "step"), [("raise", 1, 3), ("kill", 3, 1), ("hang", 0, 2), ("nan", 2, 5)]
)
def test_a_fault_is_named(soak, fault: str, environment: int, step: int) -> None:  # type: ignore[no-untyped-def]
    error, _ = soak.provoke(fault, environment, step)
    assert soak.named(error, fault, environment, step), error
    assert (error.environment, error.worker, error.seed) == (environment, environment // 2, 100 + environment)


def test_faults_are_named_without_workers(soak) -> None:  # type: ignore[no-untyped-def]
    for fault, text in (
        ("raise", r"^environment 6 \(Pendulum-v1\) in the training process raised RuntimeError: the simulation is "
                  r"unstable, at step 2 of the episode with seed 8\."),
        ("nan", r"environment 6 .* gave nan in column 0 of its observation \('observation'\), at step 2 of the"),
    ):  # fmt: skip
        envs = Environments(functools.partial(soak.faulty, fault, 8, 2), 2, first=5)
        envs.reset([7, 8])
        envs.step(np.zeros((2, 1), dtype=np.float32))
        with pytest.raises(EnvironmentFault, match=text):
            envs.step(np.zeros((2, 1), dtype=np.float32))


def test_a_fault_in_a_rebuild_and_in_a_first_observation_tell_their_step(soak) -> None:  # type: ignore[no-untyped-def]
    maker = functools.partial(soak.faulty, "raise", 8, 4)
    envs = Environments(maker, 2)
    envs.rebuild([1, 2], [np.zeros((5, 1), np.float32)] * 2)
    with pytest.raises(EnvironmentFault, match=r"environment 1 .* at step 4 of the episode with seed 8"):
        envs.rebuild([7, 8], [np.zeros((9, 1), np.float32)] * 2)
    with pytest.raises(EnvironmentFault, match=r"environment 0 .* raised Error: Seed must be .* at step 0 .* seed -1"):
        Environments(MAZE, 1, workers=1).reset([-1])


def test_a_worker_that_dies_between_steps_is_named() -> None:
    envs = Environments(HOPPER, 2, workers=2)
    envs.reset([1, 2])
    os.kill(envs._hosts[1]._process.pid, signal.SIGKILL)  # type: ignore[union-attr]
    with pytest.raises(EnvironmentFault, match=r"environment 1 \(Hopper-v5\) in worker 1 .* was killed by SIGKILL"):
        envs.step(np.zeros((2, 3), dtype=np.float32))


@pytest.mark.parametrize("workers", [0, 1])
def test_environments_that_cannot_be_made_say_why(workers: int) -> None:
    nowhere = functools.partial(os.listdir, "/nowhere")
    with pytest.raises(EnvironmentFault, match=r"^environment 0 in .* raised FileNotFoundError.*, when it was made\."):
        Environments(nowhere, 1, workers)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'Hopper-v5'") as caught:
        Environments(functools.partial(make, "Hoper-v5"), 2, workers)
    assert not isinstance(caught.value, EnvironmentFault), "a user's mistake is said as it is without workers"
    with pytest.raises(UserError, match="at least one"):
        Environments(HOPPER, 0, workers)


def test_workers_leave_signals_to_the_training_process_and_end_with_it() -> None:
    envs = Environments(HOPPER, 2, workers=2)
    first, second = envs._hosts
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(first._process.pid, number)  # type: ignore[union-attr]
    envs.reset([1, 2])
    first._pipe.close()  # as when this process is gone  # type: ignore[union-attr]
    first._process.join(60)  # type: ignore[union-attr]
    assert first._process.exitcode == 0 and second._process.is_alive()  # type: ignore[union-attr]
    envs.close()
    assert not second._process.is_alive()  # type: ignore[union-attr]
