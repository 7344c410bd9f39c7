import gymnasium as gym
import numpy as np
import pytest

from offline_cai.environments.make import env_spec, make
from offline_cai.environments.maze2d import Maze
from offline_cai.environments.vector import Environments
from offline_cai.errors import UserError
from offline_cai.evaluation.evaluate import protocol


@pytest.fixture(scope="module")
def env() -> gym.Env:
    return protocol("maze2d-umaze").make()


def test_cells_and_positions_are_the_environments(env: gym.Env) -> None:
    maze, theirs = Maze.of(env), env.unwrapped.maze
    assert len(maze.free) == 7
    for cell in maze.free:
        assert np.allclose(maze.position(cell), theirs.cell_rowcol_to_xy(np.array(cell)))
        for shift in ((0.4, -0.4), (-0.45, 0.2)):
            assert (
                maze.cell(maze.position(cell) + shift)
                == cell
                == tuple(theirs.cell_xy_to_rowcol(maze.position(cell) + shift))
            )


def test_resets_follow_the_protocol(env: gym.Env) -> None:
    maze, cells, offsets, velocities = Maze.of(env), set(), [], []
    for seed in range(200):
        obs, _ = env.reset(seed=seed)
        assert obs["desired_goal"].tolist() == [-1.0, 1.0]
        assert np.array_equal(obs["observation"][:2], obs["achieved_goal"])
        cell = maze.cell(obs["achieved_goal"])
        cells.add(cell)
        offsets.append(obs["achieved_goal"] - maze.position(cell))
        velocities.append(obs["observation"][2:])
        state = env.unwrapped.point_env
        assert np.allclose(np.concatenate([state.data.qpos, state.data.qvel]), obs["observation"]), (
            "the simulator agrees"
        )
    assert cells == set(maze.free), "every free cell is a start, the goal's too"
    assert np.abs(offsets).max() <= 0.1 and np.abs(offsets).max() > 0.09
    assert np.std(velocities) == pytest.approx(0.1, abs=4 * 0.1 / np.sqrt(2 * 400))


def test_the_same_seed_starts_alike(env: gym.Env) -> None:
    assert np.array_equal(env.reset(seed=5)[0]["observation"], env.reset(seed=5)[0]["observation"])


def test_without_a_goal_each_episode_has_one_of_its_own(env: gym.Env) -> None:
    free, goals = protocol("maze2d-umaze-goals").make(), set()
    maze = Maze.of(free)
    for seed in range(60):
        fixed, own = env.reset(seed=seed)[0], free.reset(seed=seed)[0]
        assert np.array_equal(fixed["observation"], own["observation"]), "the same starts"
        goal = maze.cell(own["desired_goal"])
        assert np.allclose(own["desired_goal"], maze.position(goal)) and goal != maze.cell(own["achieved_goal"])
        goals.add(goal)
    assert goals == set(maze.free)
    free.close()


def test_reward_is_one_within_half_a_metre_and_the_episode_goes_on(env: gym.Env) -> None:
    env.reset(seed=0)
    base = env.unwrapped.point_env
    for distance, expected in ((0.499, 1.0), (0.501, 0.0), (0.0, 1.0)):
        base.set_state(np.array([-1.0 + distance, 1.0]), np.zeros(2))
        obs, reward, terminated, _, info = env.step(np.zeros(2))
        assert reward == expected and info["success"] == bool(expected) and terminated is False
        assert np.allclose(obs["achieved_goal"], [-1.0 + distance, 1.0], atol=1e-3)


def test_an_episode_has_300_steps(env: gym.Env) -> None:
    env.reset(seed=1)
    ends = [env.step(np.zeros(2))[2:4] for _ in range(300)]
    assert not any(terminated or truncated for terminated, truncated in ends[:-1]) and ends[-1] == (False, True)


def test_the_protocol_survives_its_spec(env: gym.Env) -> None:
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))  # type: ignore[union-attr]
    assert np.array_equal(again.reset(seed=9)[0]["observation"], env.reset(seed=9)[0]["observation"])
    assert again.get_wrapper_attr("radius") == 0.5
    again.close()


def test_a_goal_in_a_wall_and_no_maze_at_all_are_errors() -> None:
    with pytest.raises(UserError, match=r"goal \(0, 0\) is no free cell"):
        make("PointMaze_UMaze-v3", wrapper="maze2d", goal=(0, 0))
    with pytest.raises(UserError, match="has no maze"):
        make("Pendulum-v1", wrapper="maze2d", goal=(1, 1))


def test_unknown_environments_and_wrappers_name_the_nearest() -> None:
    with pytest.raises(UserError, match="PointMaze_UMaze-v3"):
        make("PointMaze_Umaze-v3")
    with pytest.raises(UserError, match="did you mean 'maze2d'"):
        make("PointMaze_UMaze-v3", wrapper="maze2")
    with pytest.raises(UserError, match="at least one"):
        Environments(lambda: make("Pendulum-v1"), 0)


def test_spec_of_an_environment_has_its_time_step(env: gym.Env) -> None:
    spec = env_spec(env)
    assert [f.name for f in spec.obs] == ["achieved_goal", "desired_goal", "observation"]
    assert spec.dt == pytest.approx(0.01) and spec.action.high == (1.0, 1.0)


def test_walls_and_what_lies_outside_are_blocked(env: gym.Env) -> None:
    maze = Maze.of(env)
    points = np.array([[-1.0, 1.0], [-1.0, 0.0], [2.0, 2.0], [9.0, 0.0], [0.0, -50.0], [1.4, 0.0], [1.6, 0.0]])
    assert maze.blocked(points).tolist() == [False, True, True, True, True, False, True]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kwargs": {"bogus": 1}}, "PointMaze_UMaze-v3.*bogus"),
        ({"wrapper": "maze2d", "nonsense": 1}, "does not take.*nonsense"),
        ({"wrapper": "maze2d", "goal": (1,)}, "maze2d"),
        ({"wrapper": "maze2d", "goal": "x"}, "maze2d"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make("PointMaze_UMaze-v3", **options)
