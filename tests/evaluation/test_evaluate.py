import dataclasses

import numpy as np
import pytest

from offline_cai import config
from offline_cai.core import Spec
from offline_cai.data import minari
from offline_cai.environments.behaviour import RandomPolicy
from offline_cai.environments.make import env_spec
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import UserError
from offline_cai.evaluation import references
from offline_cai.evaluation.evaluate import Protocol, evaluate, protocol
from offline_cai.planning.planner import Planner
from offline_cai.planning.tracking import Tracker


@pytest.fixture(scope="module")
def debug() -> Protocol:
    return protocol("debug-umaze")


@pytest.fixture(scope="module")
def maze_spec(debug: Protocol) -> Spec:
    return env_spec(debug.make())


def test_policies_meet_the_same_starts_and_scores_are_normalised(debug: Protocol, maze_spec: Spec) -> None:
    results = evaluate(
        debug, {"a": lambda: RandomPolicy(maze_spec, 0), "b": lambda: RandomPolicy(maze_spec, 1)}, maze_spec, quiet=True
    )
    a, b = results["a"], results["b"]
    assert len(a.episodes) == debug.episodes and all(len(e.reward) == 40 for e in a.episodes)
    starts = np.array([e.obs[0] for e in a.episodes])
    assert np.array_equal(starts, [e.obs[0] for e in b.episodes]) and len(np.unique(starts[:, 0])) == debug.episodes
    assert not np.array_equal(a.episodes[0].action, b.episodes[0].action)
    assert np.allclose(a.normalised, 100 * (a.returns - 23.85) / (161.86 - 23.85))
    assert a.summary.n == 4 and a.to_json()["returns"] == a.returns.tolist()


def test_another_environment_and_one_without_an_end_are_refused(debug: Protocol, maze_spec: Spec) -> None:
    other = Protocol("p", "Pendulum-v1", "maze2d-umaze-v1", episodes=1, environments=1)
    policy = {"a": lambda: RandomPolicy(maze_spec, 0)}
    with pytest.raises(UserError, match=r"trained on observations achieved_goal \(2\).* gives observation \(3\)"):
        evaluate(other, policy, maze_spec, quiet=True)
    endless = dataclasses.replace(debug, kwargs={**debug.kwargs, "max_episode_steps": -1})
    with pytest.raises(UserError, match="no limit of steps"):
        evaluate(endless, policy, maze_spec, quiet=True)


@pytest.mark.parametrize("episodes", [0, 5, -2])
def test_quotas_have_to_be_even(debug: Protocol, episodes: int) -> None:
    with pytest.raises(UserError, match="positive multiple"):
        dataclasses.replace(debug, episodes=episodes)


@pytest.mark.parametrize("name", config.names("eval"))
def test_shipped_protocols_make_their_environments(name: str) -> None:
    p = protocol(name)
    env = p.make()
    assert env.reset(seed=0)
    assert all(references.find(r) for r in p.references)
    env.close()


def test_references_are_what_their_names_say(debug: Protocol, maze_spec: Spec, dataset: str) -> None:
    env = debug.make()
    setting = references.Setting(
        maze_spec, Maze.of(env), minari.trajectories(dataset), {"noise": 0.5, "kp": 7.0}, Tracker(kp=3.0, kd=0.5), 8, 0
    )
    noisy, clean = (references.find(name)(setting) for name in ("controller", "controller without noise"))
    assert (noisy._noise, clean._noise, noisy._kp, clean._kp) == (0.5, 0.0, 7.0, 7.0)  # type: ignore[attr-defined]
    path = references.find("occupancy path")(setting)
    assert isinstance(path, Planner) and path.tracker is setting.tracker, "the planner's own tracker and gains"
    assert path.act(env.reset(seed=0)[0]["observation"][[0, 1, 0, 1, 0, 1, 2, 3]][None])[0].shape == (1, 2)
    with pytest.raises(UserError, match="did you mean 'controller'"):
        references.find("controler")


def test_locomotion_needs_no_maze_and_its_references_say_so(dataset: str) -> None:
    hopper = dataclasses.replace(protocol("hopper"), episodes=2, environments=2)
    spec = env_spec(hopper.make())
    setting = references.Setting(spec, None, minari.trajectories(dataset), {}, Tracker(), 1, 0)
    result = evaluate(hopper, {"random": lambda: references.find("random")(setting)}, spec, quiet=True)["random"]
    assert np.allclose(result.normalised, 100 * (result.returns + 20.272305) / (3234.3 + 20.272305))
    assert result.normalised.max() < 10
    for name in ("controller", "controller without noise", "occupancy path"):
        with pytest.raises(UserError, match=f"the reference '{name}' needs a maze, .* leave it out"):
            references.find(name)(setting)
