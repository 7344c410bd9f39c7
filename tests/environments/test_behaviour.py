import numpy as np
import pytest

from offline_cai.environments.behaviour import MazeController, RandomPolicy
from offline_cai.environments.make import env_spec, vectorise
from offline_cai.environments.maze2d import Maze
from offline_cai.environments.rollout import rollout
from offline_cai.evaluation.evaluate import protocol


@pytest.fixture(scope="module")
def umaze():  # type: ignore[no-untyped-def]
    env = protocol("maze2d-umaze").make()
    yield env_spec(env), Maze.of(env), vectorise(protocol("maze2d-umaze").make, 7)
    env.close()


def test_the_controller_reaches_the_goal_from_every_start(umaze) -> None:  # type: ignore[no-untyped-def]
    spec, maze, envs = umaze
    for noise in (0.0, 0.5):
        episodes = rollout(envs, spec, MazeController(spec, maze, seed=0, noise=noise), seed=1, episodes=1)
        assert all(e.reward[-1] == 1 for e in episodes), "it stays at the goal"
        assert all(np.abs(e.action).max() <= 1 for e in episodes)


def test_its_path_goes_round_the_wall(umaze) -> None:  # type: ignore[no-untyped-def]
    spec, maze, _ = umaze
    controller = MazeController(spec, maze, seed=0, jitter=0.0)
    path = np.array(controller._search(maze.position((3, 1)), maze.position((1, 1)) + 0.1))
    cells = [(3, 2), (3, 3), (2, 3), (1, 3), (1, 2)]
    assert np.allclose(path, [*(maze.position(c) for c in cells), maze.position((1, 1)) + 0.1])


def test_noise_is_a_function_of_the_seed(umaze) -> None:  # type: ignore[no-untyped-def]
    spec, maze, _ = umaze
    obs = np.zeros((2, 8))
    obs[:, :2] = obs[:, 4:6] = maze.position((1, 1))
    obs[:, 2:4] = maze.position((1, 3))

    def act(seed: int, noise: float = 0.1) -> np.ndarray:
        return MazeController(spec, maze, seed, kp=0.1, noise=noise).act(obs)[0]

    assert np.array_equal(act(1), act(1)) and not np.array_equal(act(1), act(2))


def test_random_actions_are_uniform_with_their_density(umaze) -> None:  # type: ignore[no-untyped-def]
    spec = umaze[0]
    action, log_prob = RandomPolicy(spec, 0).act(np.zeros((20_000, 8)))
    assert action.min() >= -1 and action.max() <= 1
    assert np.abs(action.mean(0)).max() < 4 * np.sqrt(1 / 3 / 20_000)
    assert np.allclose(log_prob, -2 * np.log(2))
