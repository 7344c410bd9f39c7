import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from offline_cai import algorithms, config, seeding
from offline_cai.core import Batch, Discrete, Field, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError
from offline_cai.interrupts import Asked
from offline_cai.training import checkpoint, experiment, loop, online, trackers
from offline_cai.training.experiment import Experiment
from offline_cai.training.online import OnlineSource, ReplaySource, RolloutSource, Share

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import soak


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner of this test stands among the algorithms."""
    folder = Path(__file__).parent / "algorithms"
    monkeypatch.setattr(algorithms, "__path__", [*algorithms.__path__, str(folder)])


def exp(source: str, environment: str, **settings: Any) -> Experiment:
    data = {
        "name": "test",
        "algorithm": "scripted",
        "model": {"source": source},
        "environment": {"id": environment, "count": 2, **settings},
        "training": {
            "steps": 30,
            "batch_size": 16,
            "learning_rate": 0.05,
            "ema": 0.5,
            "warmup": 1,
            "log_every": 5,
            "checkpoint_every": 7,
            "trackers": [],
        },
    }
    return experiment.parse(data, "test")


def build(e: Experiment, folder: Path, share: Share | None = None, dataset: Trajectories | None = None) -> OnlineSource:
    assert e.environment is not None
    kind = ReplaySource if e.model.source == "replay" else RolloutSource
    algorithm = loop.build(e, None)
    return kind(algorithm, e.environment, e.training.batch_size, e.seed, folder, share or Share(), dataset)


MEASURED = ("step", "loss", "grad_norm", "environment_steps", "episodes", "episode_return")


def equal(a: Batch, b: Batch) -> bool:
    """In every field; a window of steps has no span."""
    same = zip(a[:-1], b[:-1], strict=True)
    return a.span is b.span is None and all(torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in same)  # type: ignore[union-attr]


def outcome(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Weights, average, optimiser and the source's tensors; its facts; what was measured, apart from time."""
    last = checkpoint.find(run)
    facts = checkpoint.source_facts(last)
    measured = trackers.read(run / "metrics.jsonl")
    rows = [{name: row[name] for name in MEASURED if name in row} for row in measured]
    return load_file(last / "state" / "training.safetensors"), facts, rows


def rows_of(run: Path, e: Experiment) -> torch.Tensor:
    """The rows of a run's replay, one after the other."""
    source = build(e, run / "replay")
    tensors, facts = checkpoint.load_state(checkpoint.find(run))
    own = {name.removeprefix("source/"): t for name, t in tensors.items() if name.startswith("source/")}
    source.load(loop.SourceState(facts["source"], own))
    source.close()
    columns = [np.column_stack([x.obs[:-1], x.action, x.reward]) for x in source._replay.episodes()]
    return torch.from_numpy(np.concatenate(columns))


def same(a: Path, b: Path, e: Experiment) -> None:
    (tensors, facts, rows), (others, other_facts, other_rows) = outcome(a), outcome(b)
    assert tensors.keys() == others.keys()
    for name in tensors:
        assert torch.equal(tensors[name].nan_to_num(-7.0), others[name].nan_to_num(-7.0)), name
    assert rows == other_rows and len(rows) == 6
    assert facts["time"] == other_facts["time"] and facts["episodes"] == other_facts["episodes"]
    assert torch.equal(rows_of(a, e), rows_of(b, e))


RUNS = {
    "replay in a pendulum": ("replay", "Pendulum-v1", {"random_steps": 20, "steps": 9}),
    "replay of Hopper": ("replay", "Hopper-v5", {"random_steps": 5, "steps": 4, "updates": 3, "capacity": 60}),
    "rollouts of Hopper": ("rollout", "Hopper-v5", {"steps": 25}),
    "rollouts in a maze": ("rollout", "PointMaze_UMaze-v3", {"steps": 12, "kwargs": {"max_episode_steps": 50}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_end(name: str, tmp_path: Path) -> None:
    """Killed in the middle of a step, long after its last checkpoint."""
    source, environment, settings = RUNS[name]
    e = exp(source, environment, **settings)
    loop.train(e, tmp_path / "whole", quiet=True)
    child = os.fork()
    if child == 0:
        step, count = OnlineSource._advance, iter(range(10_000))
        last = e.environment.random_steps + e.environment.steps * (1 + 18 // e.environment.updates) - 2  # type: ignore[union-attr]

        def killed(self: OnlineSource) -> None:
            if next(count) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self)

        OnlineSource._advance = killed  # type: ignore[method-assign]
        try:
            loop.train(e, tmp_path / "killed", quiet=True)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert checkpoint.find(tmp_path / "killed").name == "step-00000014"
    loop.train(e, tmp_path / "killed", resume=True, quiet=True)
    same(tmp_path / "whole", tmp_path / "killed", e)


@pytest.mark.parametrize("kind", ["replay", "rollout"])
def test_several_processes_see_what_one_would(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources in two threads, whose rows meet at a barrier, against one."""
    e = exp(kind, "Hopper-v5", count=4, random_steps=3, steps=20)
    algorithm, barrier = loop.build(e, None), threading.Barrier(2)
    monkeypatch.setattr(loop, "build", lambda e, data: algorithm)
    rows, got = [np.empty(0)] * 2, [[], []]  # type: ignore[var-annotated]

    def work(rank: int) -> None:
        def gather(own: np.ndarray) -> np.ndarray:
            rows[rank] = own
            barrier.wait()
            joined = np.concatenate(rows)
            barrier.wait()
            return joined

        source = build(e, tmp_path, Share(rank, 2, gather))
        got[rank] += [*(source(step) for step in range(4)), source.state()]
        source.close()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    single = build(e, tmp_path)
    for step in range(4):
        joined = [torch.cat([part[step][i] for part in got]) for i in range(len(Batch._fields) - 1)]
        assert equal(single(step), Batch(*joined)), step
    assert got[0][-1].facts == single.state().facts and got[1][-1].facts == {}, "one of them writes"
    single.close()


@pytest.mark.parametrize("kind", ["replay", "rollout"])
def test_two_processes_of_which_one_is_killed_resume_bit_for_bit(kind: str, tmp_path: Path) -> None:
    learner, settings = str(Path(__file__).parent / "algorithms"), {"random_steps": 3, "steps": 2}
    (tmp_path / "online.yaml").write_text(config.dump(exp(kind, "Hopper-v5", **settings)))
    whole, killed = (
        soak.Run(tmp_path, name, processes=2, config=str(tmp_path / "online.yaml")) for name in ("whole", "killed")
    )
    assert whole.finish(f"gather:{learner}") == 0, whole.said()
    assert killed.finish(f"gather:{learner}|40") != 0, "after 18 updates of 30"
    assert checkpoint.find(killed.folder).name == "step-00000014"
    assert killed.finish(f"gather:{learner}") == 0, killed.said()
    assert killed.result() == whole.result()


def test_gathering_ends_early_when_asked_and_goes_on_from_there(tmp_path: Path) -> None:
    e = exp("replay", "Pendulum-v1", random_steps=50)
    whole, source = build(e, tmp_path / "whole"), build(e, tmp_path)
    asked = iter([False] * 20 + [True])
    source.asked = lambda: next(asked)
    with pytest.raises(Asked):
        source(0)
    assert source.metrics()["environment_steps"] == 42, "21 steps of 2 environments"
    again = build(e, tmp_path)
    again.load(source.state())
    assert equal(again(0), whole(0))


def test_batches_are_due_when_the_config_says(tmp_path: Path) -> None:
    e = exp("replay", "Pendulum-v1", random_steps=10, steps=4, updates=3)
    source = build(e, tmp_path)
    times = []
    for step in range(8):
        source(step)
        times.append(int(source.metrics()["environment_steps"]))
    assert times == [28, 28, 28, 36, 36, 36, 44, 44]
    assert "episode_return" not in source.metrics(), "no episode ended yet"
    source.close()


def test_a_rollout_is_all_of_the_latest_steps_by_the_present_weights(tmp_path: Path) -> None:
    e = exp("rollout", "Hopper-v5", steps=40, count=3)
    source = build(e, tmp_path)
    algorithm: Any = source._algorithm
    for step in range(3):
        with torch.no_grad():
            algorithm.weight += 0.05 * step
        batch = source(step)
        assert int(batch.valid.sum()) == 3 * 40 and len(batch.obs) > 3, "all steps, in pieces of episodes"
        unit = algorithm.spec.to_unit(batch.action[:, :, 0])
        inside = batch.valid & (unit.abs() < 1 - 1e-5).all(-1)
        expected = algorithm.log_prob(algorithm.mean(batch.obs[:, :-1]), unit)
        assert inside.sum() > 20
        assert torch.allclose(batch.log_prob[..., 0][inside], expected[inside].detach(), atol=1e-3)  # type: ignore[index]
        assert batch.terminal.any() and (batch.terminal.sum(1) <= 1).all()
    assert source.metrics()["environment_steps"] == 360
    source.close()


def test_random_steps_are_uniform_and_the_dataset_is_drawn_from_as_well(tmp_path: Path) -> None:
    e = exp("replay", "Pendulum-v1", random_steps=400, count=1)
    source = build(e, tmp_path)
    source(0)
    (episode, *_) = source._replay.episodes()
    assert np.abs(np.sort(episode.action[:, 0]) - np.linspace(-2, 2, len(episode.action))).max() < 0.4
    assert episode.log_prob is not None and np.allclose(episode.log_prob, -np.log(2.0))
    data = Trajectories.from_episodes(source._algorithm.spec, [episode._replace(obs=episode.obs + 100, log_prob=None)])
    mixed = build(exp("replay", "Pendulum-v1", random_steps=199, count=1, updates=100), tmp_path, dataset=data)
    old = sum(int((mixed(step).obs[:, 0, 0] > 50).sum()) for step in range(100))
    assert abs(old - 800) < 4 * 20, "half of 1600, as much as its share of the steps, within four standard errors"
    source.close()
    mixed.close()


def test_random_choices_are_uniform() -> None:
    spec = Spec((Field("observation", 1),), Discrete((3, 2), (5, 0)))
    action, log_prob = online._uniform(spec, seeding.keys(0, 0, torch.arange(6000)))
    values, counts = np.unique(action, axis=0, return_counts=True)
    assert values.tolist() == [[a, b] for a in (5, 6, 7) for b in (0, 1)] and np.allclose(log_prob, -np.log(6.0))
    assert abs(counts - 1000).max() < 4 * 29, "a thousand each, within four standard errors"


# Faults --------------------------------------------------------------------------------------------------------------


class Moody(gym.Wrapper):
    """A pendulum that fails in the second episode while `broken`, and draws from a global generator while `loose`."""

    broken = loose = False

    def reset(self, **arguments: Any) -> Any:
        self.episode = getattr(self, "episode", 0) + 1
        return self.env.reset(**arguments)

    def step(self, action: Any) -> Any:
        obs, *rest = self.env.step(action)
        if self.broken and self.episode == 2:
            raise RuntimeError("a joint came loose")
        return (obs + np.random.normal(size=3).astype(np.float32) if self.loose else obs), *rest


@pytest.fixture
def moody() -> Iterator[str]:
    gym.register("Moody-v0", lambda: Moody(gym.make("Pendulum-v1", max_episode_steps=50)))
    yield "Moody-v0"
    del gym.registry["Moody-v0"]
    Moody.broken = Moody.loose = False


def test_a_fault_keeps_what_was_gathered_and_the_run_goes_on_when_it_is_mended(moody: str, tmp_path: Path) -> None:
    e = exp("replay", moody, steps=5)
    loop.train(e, tmp_path / "whole", quiet=True)
    Moody.broken = True
    named = (
        r"environment 0 \(Moody-v0\) in the training process raised RuntimeError: a joint came loose, at step 1 of .*"
    )
    with pytest.raises(UserError, match=named + r".*seed \d+\. What was gathered until then is kept.* --resume"):
        loop.train(e, tmp_path / "broken", quiet=True)
    last = checkpoint.find(tmp_path / "broken")
    assert last.name == "step-00000010" and checkpoint.source_facts(last)["time"] == 50
    Moody.broken = False
    loop.train(e, tmp_path / "broken", resume=True, quiet=True)
    same(tmp_path / "whole", tmp_path / "broken", e)


def test_an_environment_that_does_not_do_the_same_again_is_refused(moody: str, tmp_path: Path) -> None:
    Moody.loose = True
    e = exp("replay", moody, steps=4)
    loop.train(e, tmp_path, quiet=True)
    longer = replace(e, training=replace(e.training, steps=40))
    first_difference = r"the \d+ actions of its episode lead to another observation at step 1\."
    with pytest.raises(UserError, match=r"environment 0 \(Moody-v0\) does not do the same again.*" + first_difference):
        loop.train(longer, tmp_path, resume=True, quiet=True)


def test_old_segments_go_with_their_checkpoints(tmp_path: Path) -> None:
    loop.train(exp("rollout", "Pendulum-v1", steps=5), tmp_path, quiet=True)
    named = {
        segment["file"]
        for path in checkpoint.checkpoints(tmp_path / "checkpoints")
        for segment in checkpoint.source_facts(path)["replay"]["segments"]
    }
    assert {path.name for path in (tmp_path / "replay").iterdir()} == named


def test_what_an_algorithm_learns_from_has_to_be_there(dataset: str, tmp_path: Path) -> None:
    data = {"name": "x", "algorithm": "scripted"}
    with pytest.raises(UserError, match=r"name a dataset, or an environment \(environment.id\)"):
        experiment.parse(data, "x")
    for more, text in (
        ({"dataset": dataset}, "scripted gathers its data itself: name an environment with environment.id"),
        ({"algorithm": "bc", "environment": {"id": "Hopper-v5"}}, "bc learns from a dataset: name one"),
        (
            {"environment": {"id": "PointMaze_UMaze-v3"}, "dataset": dataset, "model": {"source": "rollout"}},
            "leave out",
        ),
        ({"environment": {"id": "Hopper-v5"}, "dataset": dataset}, "was trained on observations .* environment gives"),
    ):
        with pytest.raises(UserError, match=text):
            loop.train(experiment.parse(data | more, "x"), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"environment.count is 3, and 2 processes cannot share that evenly"):
        build(exp("replay", "Pendulum-v1", count=3), tmp_path, Share(0, 2))
    with pytest.raises(UserError, match=r"environment.updates is 0; it has to be at least 1"):
        exp("replay", "Pendulum-v1", updates=0)
