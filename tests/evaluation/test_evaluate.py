import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offline_cai import config
from offline_cai.core import Episode, Spec
from offline_cai.data import catalogue, minari
from offline_cai.environments.behaviour import RandomPolicy
from offline_cai.environments.make import env_spec
from offline_cai.environments.maze2d import Maze
from offline_cai.environments.rollout import Care
from offline_cai.environments.vector import Environments
from offline_cai.errors import Notice, UserError
from offline_cai.evaluation import references
from offline_cai.evaluation.evaluate import Protocol, _Kept, _read, _write, evaluate, protocol
from offline_cai.planning.config import PlannerConfig
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
def test_shipped_protocols_make_their_environments(name: str, dataset: str) -> None:
    p = protocol(name).on(dataset)
    env = p.make()
    assert env.reset(seed=0)
    assert all(references.find(r) for r in p.references)
    env.close()


def test_references_are_what_their_names_say(debug: Protocol, maze_spec: Spec, dataset: str) -> None:
    env = debug.make()
    setting = references.Setting(
        maze_spec,
        Maze.of(env),
        minari.trajectories(dataset),
        {"noise": 0.5, "kp": 7.0},
        PlannerConfig(tracker=Tracker(kp=3.0, kd=0.5)),
        8,
        0,
    )
    noisy, clean = (references.find(name)(setting) for name in ("controller", "controller without noise"))
    assert (noisy._noise, clean._noise, noisy._kp, clean._kp) == (0.5, 0.0, 7.0, 7.0)  # type: ignore[attr-defined]
    path = references.find("occupancy path")(setting)
    assert isinstance(path, Planner) and path.tracker is setting.planner.tracker, "the planner's own tracker and gains"
    assert path.act(env.reset(seed=0)[0]["observation"][[0, 1, 0, 1, 0, 1, 2, 3]][None])[0].shape == (1, 2)
    with pytest.raises(UserError, match="did you mean 'controller'"):
        references.find("controler")
    with pytest.raises(UserError, match="did you mean 'actor:FILE'"):
        references.find("actor")


def test_locomotion_needs_no_maze_and_its_references_say_so(dataset: str) -> None:
    hopper = dataclasses.replace(protocol("hopper"), episodes=2, environments=2)
    spec = env_spec(hopper.make())
    setting = references.Setting(spec, None, minari.trajectories(dataset), {}, PlannerConfig(), 1, 0)
    result = evaluate(hopper, {"random": lambda: references.find("random")(setting)}, spec, quiet=True)["random"]
    assert np.allclose(result.normalised, 100 * (result.returns + 20.272305) / (3234.3 + 20.272305))
    assert result.normalised.max() < 10
    for name in ("controller", "controller without noise", "occupancy path"):
        with pytest.raises(UserError, match=f"the reference '{name}' needs a maze, .* leave it out"):
            references.find(name)(setting)


def test_without_references_scores_are_raw_returns() -> None:
    pendulum = dataclasses.replace(protocol("pendulum"), episodes=2, environments=2)
    spec = env_spec(pendulum.make())
    result = evaluate(pendulum, {"random": lambda: RandomPolicy(spec, 0)}, spec, quiet=True)["random"]
    assert result.normalised is None and np.array_equal(result.scores, result.returns) and result.returns.max() < 0
    assert result.to_json()["normalised"] is None and result.summary.mean == result.returns.mean()
    scaled = dataclasses.replace(pendulum, score=(-2000.0, 0.0))
    result = evaluate(scaled, {"random": lambda: RandomPolicy(spec, 0)}, spec, quiet=True)["random"]
    assert np.allclose(result.scores, 100 * (result.returns + 2000) / 2000)
    with pytest.raises(UserError, match="are no scale"):
        dataclasses.replace(pendulum, score=(1.0, 1.0))
    flagged = protocol("pendulum", {"score": "[-1500, 0]"})
    assert flagged.reference == (-1500, 0) and protocol("pendulum", {"score": "hopper-medium-v2"}).reference


def test_choices_are_evaluated_as_boxes_are() -> None:
    cartpole = dataclasses.replace(protocol("cartpole"), episodes=4, environments=2)
    spec = env_spec(cartpole.make())
    result = evaluate(cartpole, {"random": lambda: RandomPolicy(spec, 0)}, spec, quiet=True)["random"]
    assert all(set(np.unique(e.action)) <= {0, 1} for e in result.episodes)
    assert result.returns.tolist() == [len(e.reward) for e in result.episodes] and result.returns.min() > 5


def test_references_of_another_environment_are_a_warning() -> None:
    for name in ("walker2d", "ant"):
        p = dataclasses.replace(protocol(name), episodes=1, environments=1, kwargs={"max_episode_steps": 1})
        spec = env_spec(p.make())
        with pytest.warns(Notice, match="is another task than the .* of D4RL's references"):
            evaluate(p, {"random": lambda spec=spec: RandomPolicy(spec, 0)}, spec, quiet=True)
    for name in ("walker2d-v4", "hopper", "hopper-v4", "halfcheetah", "maze2d-umaze", "adroit-door", "pendulum"):
        assert protocol(name).mismatch is None
    assert protocol("pendulum", {"environment": "Walker2d-v5"}).mismatch is None, "raw returns claim nothing"


def test_a_dataset_s_own_evaluation_environment(debug: Protocol, dataset: str) -> None:
    """The one that its recipe named: the same environment, wrapper and references as that protocol has."""
    own = protocol("dataset", {"episodes": "4", "environments": "2"}).on(dataset)
    theirs = minari.load(dataset).recover_environment(eval_env=True)
    ours = own.make()
    assert np.array_equal(ours.reset(seed=3)[0]["observation"], theirs.reset(seed=3)[0]["observation"])
    assert type(ours) is type(theirs) and own.wrapper == "maze2d" and own.options == {"goal": [1, 1], "radius": 0.5}
    assert ours.spec and ours.spec.max_episode_steps == 40 and own.reference == pytest.approx(debug.reference)
    spec = env_spec(ours)
    results = [evaluate(p, {"a": lambda: RandomPolicy(spec, 0)}, spec, quiet=True)["a"] for p in (own, debug)]
    assert np.array_equal(results[0].scores, results[1].scores)
    with pytest.raises(UserError, match="there is no dataset to evaluate in"):
        protocol("dataset").on(None)
    with pytest.raises(UserError, match="names no environment to evaluate in"):
        protocol("dataset").on("own.npz")


def test_a_wrapper_that_is_not_ours_is_not_run(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = catalogue.Simulator("Pendulum-v1", {}, [("TimeMachine", {})])
    monkeypatch.setattr(catalogue, "evaluation_environment", lambda name: foreign)
    with pytest.raises(UserError, match="is evaluated in Pendulum-v1 with TimeMachine, which cannot be made"):
        protocol("dataset").on(dataset)


def test_workers_give_the_same_episodes(debug: Protocol, maze_spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, float]] = []

    class Watched(Environments):
        def __init__(self, maker: Any, count: int, workers: int, timeout: float) -> None:
            made.append((workers, timeout))
            super().__init__(maker, count, workers, timeout)

    monkeypatch.setattr("offline_cai.evaluation.evaluate.Environments", Watched)
    here, there = (
        evaluate(p, {"a": lambda: RandomPolicy(maze_spec, 0)}, maze_spec, quiet=True)["a"]
        for p in (debug, dataclasses.replace(debug, workers=2, timeout=30.0))
    )
    assert made == [(0, 60.0), (2, 30.0)]
    assert np.array_equal(here.returns, there.returns)
    assert all(np.array_equal(a.obs, b.obs) for a, b in zip(here.episodes, there.episodes, strict=True))
    with pytest.raises(UserError, match="workers has to be at least 0"):
        dataclasses.replace(debug, workers=-1)


def test_what_was_repeated_and_cut_is_said_and_in_the_result(
    debug: Protocol, maze_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rollout(*args: Any, care: Care, **kwargs: Any) -> list[Episode]:
        care.repeated.append("environment 1 in worker 0 died.")
        care.cut.extend([(0, 1), (1, 0)])
        return [Episode(np.zeros((2, 8)), np.zeros((1, 2)), np.ones(1), False)] * 4

    monkeypatch.setattr("offline_cai.evaluation.evaluate.rollout", rollout)
    p = dataclasses.replace(debug, episode_seconds=3.0)
    with pytest.warns(Notice) as notices:
        result = evaluate(p, {"a": lambda: RandomPolicy(maze_spec, 0)}, maze_spec, quiet=True)["a"]
    said = [str(notice.message) for notice in notices]
    assert said[0] == "an episode of 'a' was repeated: environment 1 in worker 0 died."
    assert said[1].startswith(
        "2 of 4 episodes of 'a' were cut after 3 s (episode 1 of environment 0, 0 of environment 1)"
    )
    assert result.to_json()["cut"] == [(0, 1), (1, 0)] and len(result.to_json()["repeated"]) == 1


def test_finished_policies_are_kept_and_not_run_again(debug: Protocol, maze_spec: Spec, tmp_path: Path) -> None:
    def broken() -> RandomPolicy:
        raise KeyboardInterrupt

    policies: dict[str, Any] = {"a": lambda: RandomPolicy(maze_spec, 0), "b": lambda: RandomPolicy(maze_spec, 1)}
    whole = evaluate(debug, policies, maze_spec, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        evaluate(debug, {**policies, "b": broken}, maze_spec, quiet=True, keep=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 1
    resumed = evaluate(debug, {**policies, "a": lambda: pytest.fail("run again")}, maze_spec, quiet=True, keep=tmp_path)
    for name, result in whole.items():
        kept = resumed[name]
        assert np.array_equal(result.returns, kept.returns) and np.array_equal(result.scores, kept.scores)
        for one, other in zip(result.episodes, kept.episodes, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(b"damaged")
    again = evaluate(debug, policies, maze_spec, quiet=True, keep=tmp_path)
    assert np.array_equal(again["b"].returns, whole["b"].returns), "what cannot be read is done again"


@pytest.mark.parametrize(
    "facts",
    ["{", "5", "[]", '{"seconds": 1, "account": {}}', '{"seconds": 1, "account": {}, "cut": 3}',
     '{"seconds": 1, "account": {}, "cut": [], "unknown": 1}'],
)  # fmt: skip
def test_what_was_kept_and_cannot_be_read_counts_as_not_kept(facts: str, tmp_path: Path) -> None:
    episode = Episode(np.zeros((3, 4)), np.zeros((2, 1)), np.ones(2), True)
    path = tmp_path / "kept.npz"
    _write(path, _Kept([episode, episode], Care(None, [], [(0, 1)]), 1.0, {}))
    kept = _read(path)
    assert kept is not None and len(kept.episodes) == 2 and kept.care.cut == [(0, 1)]
    with np.load(path) as data:
        arrays = {**data, "facts": np.array(facts)}
    np.savez(path, **arrays)
    assert _read(path) is None
    path.write_bytes(b"")
    assert _read(path) is None


def test_early_results_are_the_mean_of_what_is_finished(
    debug: Protocol, maze_spec: Spec, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(debug, {"a": lambda: RandomPolicy(maze_spec, 0)}, maze_spec)["a"]
    shown = capsys.readouterr().err
    assert f"score {result.scores.mean():.1f} of 4 episodes" in shown and "evaluate a" in shown
