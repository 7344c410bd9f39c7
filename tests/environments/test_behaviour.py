import numpy as np
import pytest

from offline_cai.core import Box, Field, Spec
from offline_cai.environments.behaviour import MazeController, Noisy, RandomPolicy
from offline_cai.environments.make import env_spec
from offline_cai.environments.maze2d import Maze
from offline_cai.environments.rollout import rollout
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError
from offline_cai.evaluation.evaluate import protocol


@pytest.fixture(scope="module")
def umaze():  # type: ignore[no-untyped-def]
    env = protocol("maze2d-umaze").make()
    yield env_spec(env), Maze.of(env), Environments(protocol("maze2d-umaze").make, 7)
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


class Zero:
    """Acts with the middle of the bounds, and says how sure it is."""

    def reset(self, done: np.ndarray | None = None) -> None:
        pass

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full((len(obs), 2), [0.0, 1.0]), np.zeros(len(obs))


WIDE = Spec((Field("observation", 1),), Box((-1.0, -2.0), (1.0, 4.0)))


def test_gaussian_noise_has_its_scale_in_unit_space_and_is_clipped() -> None:
    action, log_prob = Noisy(Zero(), WIDE, 0, gaussian=0.2).act(np.zeros((20_000, 1)))
    assert log_prob is None
    assert np.allclose(action.std(0), [0.2, 0.6], rtol=4 / np.sqrt(2 * 20_000))
    assert np.allclose(action.mean(0), [0.0, 1.0], atol=4 * 0.6 / np.sqrt(20_000))
    clipped, _ = Noisy(Zero(), WIDE, 0, gaussian=5.0).act(np.zeros((100, 1)))
    assert clipped.min(0).tolist() == [-1.0, -2.0] and clipped.max(0).tolist() == [1.0, 4.0]


def test_epsilon_is_the_share_of_uniform_actions() -> None:
    action, _ = Noisy(Zero(), WIDE, 0, epsilon=0.25).act(np.zeros((20_000, 1)))
    moved = (action != [0.0, 1.0]).any(1)
    assert moved.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 20_000))
    assert (action[moved] != [0.0, 1.0]).all(), "the whole action is replaced"
    assert np.allclose(action[moved].std(0), [2 / np.sqrt(12), 6 / np.sqrt(12)], rtol=0.05)


def test_the_noise_of_an_environment_does_not_depend_on_its_neighbours() -> None:
    noisy = Noisy(Zero(), WIDE, 3, gaussian=0.2, epsilon=0.1)

    def run(count: int) -> np.ndarray:
        noisy.reset(None)
        return np.stack([noisy.act(np.zeros((count, 1)))[0] for _ in range(300)])

    assert np.array_equal(run(3)[:, 0], run(1)[:, 0]) and not np.array_equal(run(3)[:, 0], run(3)[:, 1])


@pytest.mark.parametrize("noise", [{"gaussian": -0.1}, {"epsilon": 1.1}, {"epsilon": -0.1}])
def test_noise_out_of_range_is_refused(noise: dict[str, float]) -> None:
    with pytest.raises(UserError, match="have to be at least 0"):
        Noisy(Zero(), WIDE, 0, **noise)
