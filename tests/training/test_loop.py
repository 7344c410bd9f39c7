import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from offline_cai import commands
from offline_cai.data import minari
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation import evaluate
from offline_cai.interrupts import Interrupt
from offline_cai.training import checkpoint, experiment, folder, loop, sources, state, trackers
from offline_cai.training.experiment import Experiment
from offline_cai.training.practice import Practice
from offline_cai.training.state import TrainingState


@pytest.fixture
def exp(dataset: str) -> Experiment:
    return experiment.load("debug-diffuser")


def change(exp: Experiment, **training: object) -> Experiment:
    return dataclasses.replace(exp, training=dataclasses.replace(exp.training, **training))  # type: ignore[arg-type]


def weights(run: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.find(run)
    return load_file(last / "state" / "training.safetensors") | load_file(last / "export" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_s_folder_holds_what_it_promises(run: Path) -> None:
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "versions.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
    }
    rows = trackers.read(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert all({"loss", "grad_norm", "learning_rate", "seconds"} <= row.keys() for row in rows)
    assert [path.name for path in checkpoint.checkpoints(run / "checkpoints")] == ["step-00000010", "step-00000020"]
    assert any(path.name.startswith("events") for path in (run / "tensorboard").rglob("*"))
    exp = commands.resumed(run, {})
    assert exp == experiment.load("debug-diffuser")


def test_the_same_seed_gives_the_same_run_and_another_does_not(exp: Experiment, run: Path, tmp_path: Path) -> None:
    commands.train(exp, tmp_path / "again", quiet=True)
    assert same(run, tmp_path / "again")
    commands.train(dataclasses.replace(exp, seed=1), tmp_path / "other", quiet=True)
    assert not same(run, tmp_path / "other")


def test_the_export_holds_the_average_and_the_state_the_raw_weights(exp: Experiment, tmp_path: Path) -> None:
    runs = {}
    for ema in (0.0, 0.9):
        commands.train(change(exp, ema=ema), tmp_path / str(ema), quiet=True)
        tensors = weights(tmp_path / str(ema))
        name = next(key for key in tensors if key.startswith("network") and key.endswith("weight"))
        runs[ema] = (tensors[name], tensors[f"model/{name}"])
    assert torch.equal(*runs[0.0]) and not torch.equal(*runs[0.9])
    assert torch.equal(runs[0.0][1], runs[0.9][1]), "averaging does not touch training"


def test_a_resumed_run_is_the_same_run(
    exp: Experiment, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = tmp_path / "half"
    original = sources.OfflineSource.__call__

    def interrupt(self, step: int):  # type: ignore[no-untyped-def]
        if step == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step)

    monkeypatch.setattr(sources.OfflineSource, "__call__", interrupt)
    with pytest.raises(Interrupted, match=f"stopped at step 13 of 20. Resume with: offline-cai train --resume {half}"):
        commands.train(exp, half, quiet=True)
    assert checkpoint.find(half).name == "step-00000013"
    monkeypatch.undo()
    commands.train(commands.resumed(half, {}), half, resume=True, quiet=True)
    assert same(run, half)
    assert [row["step"] for row in trackers.read(half / "metrics.jsonl")] == [5, 10, 15, 20]


def test_the_average_follows_its_definition(exp: Experiment, tmp_path: Path) -> None:
    """Of two steps from w0: average = decay^2 w0 + decay (1 - decay) w1 + (1 - decay) w2."""
    two = change(exp, steps=2, checkpoint_every=1, ema=0.75)
    commands.train(two, tmp_path / "r", quiet=True)
    states = [
        load_file(p / "state" / "training.safetensors") for p in checkpoint.checkpoints(tmp_path / "r/checkpoints")
    ]
    acting = load_file(checkpoint.find(tmp_path / "r") / "export" / "model.safetensors")
    first = loop.build(two, minari.trajectories(two.dataset)).state_dict()
    for name in (key for key in first if key.startswith("network")):
        w0, w1, w2 = first[name], *(state[f"model/{name}"] for state in states)
        assert torch.allclose(acting[name], 0.75**2 * w0 + 0.75 * 0.25 * w1 + 0.25 * w2, atol=1e-6), name


def test_the_learning_rate_is_a_function_of_the_step() -> None:
    def rate(step: int, **settings: object) -> float:
        config = experiment.TrainingConfig(steps=1000, **settings)  # type: ignore[arg-type]
        stand_in = type("S", (), {"config": config, "slowdown": 1.0, "optimisers": {"actor": None}})()
        return TrainingState.learning_rates(stand_in, step)["actor"]  # type: ignore[arg-type]

    assert rate(0) == pytest.approx(1e-5, rel=1e-3) and rate(99) == pytest.approx(1e-3, rel=0.03)
    assert rate(1000) == pytest.approx(2e-5) and rate(999) < rate(500) < rate(150)
    assert rate(999, schedule="constant") == 1e-3
    assert rate(999, schedule="constant", learning_rate={"actor": 0.5, "critic": 1.0}) == 0.5
    with pytest.raises(UserError, match=r"learning_rate has none for actor; it has critic\."):
        rate(0, learning_rate={"critic": 1.0})


def test_an_existing_folder_is_not_overwritten(exp: Experiment, run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"a run of diffuser with 20 of 20 steps done, and is not .*--resume"):
        commands.train(exp, run, quiet=True)
    assert (run / "metrics.jsonl").read_text() == before


def test_divergence_is_said_and_not_saved(exp: Experiment, tmp_path: Path) -> None:
    wild = change(exp, learning_rate=1e30, clip=None, warmup=1, log_every=1, checkpoint_every=1000)
    with pytest.raises(
        UserError, match=r"training diverged after 1 steps: loss is \w+\. Lower .*no checkpoint was written yet"
    ):
        commands.train(wild, tmp_path / "wild", quiet=True)
    assert not checkpoint.checkpoints(tmp_path / "wild" / "checkpoints")


def test_a_resume_with_another_model_names_the_field(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    text = (tmp_path / "r" / "config.yaml").read_text()
    (tmp_path / "r" / "config.yaml").write_text(text.replace("channels: 8", "channels: 16"))
    with pytest.raises(UserError, match=r"its model.channels is 8, here it is 16. Resume with the config"):
        commands.train(commands.resumed(tmp_path / "r", {}), tmp_path / "r", resume=True, quiet=True)


def test_exploding_gradients_are_divergence(exp: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "GRADIENT_LIMIT", 1e-3)
    with pytest.raises(UserError, match=r"training diverged after 0 steps: grad_norm is \d"):
        commands.train(exp, tmp_path / "r", quiet=True)


def test_skipping_ends_when_nothing_else_happens(
    exp: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MOST_SKIPPED", 3)
    monkeypatch.setattr(state, "GRADIENT_LIMIT", 1e-3)
    with pytest.raises(UserError, match=r"training diverged after 3 steps: grad_norm is \d"):
        commands.train(change(exp, on_divergence="skip", log_every=1), tmp_path / "r", quiet=True)
    rows = trackers.read(tmp_path / "r" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [1, 2, 3]


def test_a_disk_that_is_full_for_metrics_is_said(exp: Experiment, tmp_path: Path) -> None:
    metrics = trackers.MetricsFile(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: .*The checkpoints so far are untouched"):
        metrics.write(1, {"loss": 1.0})


def test_nan_weights_are_never_saved(exp: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that something else spoils between two losses: the checkpoint that is due is refused."""
    average = TrainingState.average

    def spoil(self: TrainingState) -> None:
        average(self)
        if self.optimisers["all"].param_groups[0]["lr"] == self.learning_rates(2)["all"]:
            next(self.algorithm.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(TrainingState, "average", spoil)
    with pytest.raises(UserError, match=r"training diverged after 3 steps: the weight network\S+ is not finite"):
        commands.train(change(exp, checkpoint_every=1, keep=9), tmp_path / "wild", quiet=True)
    assert len(checkpoint.checkpoints(tmp_path / "wild" / "checkpoints")) == 2


def test_a_resume_goes_further_and_says_so_in_its_config(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    longer = commands.resumed(tmp_path / "r", {"training.steps": "30"})
    commands.train(longer, tmp_path / "r", resume=True, quiet=True)
    assert commands.resumed(tmp_path / "r", {}).training.steps == 30
    rows = trackers.read(tmp_path / "r" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25, 30]
    assert (np.diff([row["seconds"] for row in rows]) > 0).all(), "time goes on where it stopped"
    with pytest.raises(UserError, match=r"--training.batch_size cannot change on a resume"):
        commands.resumed(tmp_path / "r", {"training.batch_size": "4"})


def test_a_resume_refuses_other_data_and_steps_that_are_past(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run, tmp_path / "r")
    with pytest.raises(UserError, match="has done 20 steps already"):
        commands.train(
            commands.resumed(tmp_path / "r", {"training.steps": "12"}), tmp_path / "r", resume=True, quiet=True
        )
    assert "steps: 20" in (tmp_path / "r" / "config.yaml").read_text()
    before = (tmp_path / "r" / "stages.json").read_text()
    monkeypatch.setattr(sources, "digests", lambda path: {"rows": "other"})
    with pytest.raises(UserError, match="not the one that this run was trained on"):
        commands.train(
            commands.resumed(tmp_path / "r", {"training.steps": "30"}), tmp_path / "r", resume=True, quiet=True
        )
    assert (tmp_path / "r" / "stages.json").read_text() == before, "what was refused took no time"


def test_a_run_without_checkpoints_resumes_from_the_start(exp: Experiment, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    commands.train(commands.resumed(tmp_path / "r", {}), tmp_path / "r", resume=True, quiet=True)
    assert same(run, tmp_path / "r")


def test_two_processes_cannot_train_into_one_folder(exp: Experiment, run: Path, tmp_path: Path) -> None:
    import fcntl

    shutil.copytree(run, tmp_path / "r")
    with (tmp_path / "r" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is training into .* \(it does not say which\)"):
            commands.train(commands.resumed(tmp_path / "r", {}), tmp_path / "r", resume=True, quiet=True)


def test_evaluations_leave_training_alone_and_keep_the_best(
    exp: Experiment, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {5: 3.0, 10: 1.0, 15: 2.0, 20: 2.5}

    def score(self: Practice, weights: object, interrupt: object) -> dict[str, float]:
        result = original(self, weights, interrupt)  # type: ignore[arg-type]
        return {"score": scores[len(seen) * 5 + 5], "return": seen.append(result["return"]) or 0.0}  # type: ignore[func-returns-value]

    original, seen = Practice.__call__, list[float]()
    monkeypatch.setattr(Practice, "__call__", score)
    commands.train(change(exp, evaluate_every=5, evaluate_episodes=4, keep=1), tmp_path / "r", quiet=True)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "r" / "checkpoints")]
    assert names == ["step-00000005", "step-00000020"], "the last one and the best"
    assert same(run, tmp_path / "r"), "no draw of training depends on an evaluation"
    rows = trackers.read(tmp_path / "r" / "metrics.jsonl")
    assert {row["step"]: row["score"] for row in rows if "score" in row} == scores
    training = [trackers.timeless(row) for row in rows if "score" not in row]
    assert training == [trackers.timeless(row) for row in trackers.read(run / "metrics.jsonl")]


def test_an_evaluation_is_on_starts_of_its_own_and_repeats(exp: Experiment) -> None:
    algorithm = loop.build(exp, minari.trajectories(exp.dataset))
    practice = Practice.of(change(exp, evaluate_every=5, evaluate_episodes=6), algorithm)
    assert practice is not None and Practice.of(exp, algorithm) is None
    protocol = evaluate.protocol(exp.protocol or "")
    assert practice._protocol.episodes == 6 and practice._protocol.environments == 2 and protocol.environments == 2
    assert practice._protocol.seed != protocol.seed
    weights, idle = algorithm.state_dict(), Interrupt()
    idle.asked = 0
    assert practice(weights, idle) == practice(weights, idle)


def test_a_stop_during_an_evaluation_is_made_up_for_by_the_resume(
    exp: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(exp, evaluate_every=10, evaluate_episodes=2)
    commands.train(config, tmp_path / "whole", quiet=True)
    original = Practice.__call__

    def stop(self: Practice, weights: object, interrupt: object) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, weights, interrupt)  # type: ignore[arg-type]

    monkeypatch.setattr(Practice, "__call__", stop)
    with pytest.raises(Interrupted, match="stopped at step 10 of 20") as stopped:
        commands.train(config, tmp_path / "half", quiet=True)
    assert stopped.value.status == 143 and "score" not in (tmp_path / "half" / "metrics.jsonl").read_text()
    monkeypatch.undo()
    commands.train(commands.resumed(tmp_path / "half", {}), tmp_path / "half", resume=True, quiet=True)
    assert same(tmp_path / "whole", tmp_path / "half")
    whole, half = (trackers.read(tmp_path / name / "metrics.jsonl") for name in ("whole", "half"))
    assert [trackers.timeless(row) for row in whole] == [trackers.timeless(row) for row in half]


def test_shares_of_time_are_told(run: Path) -> None:
    for row in trackers.read(run / "metrics.jsonl"):
        shares = [row[f"share_{part}"] for part in ("data", "environment", "update", "evaluation", "checkpoint")]
        assert row["steps_per_second"] > 0 and row["share_update"] > 0 and 0 <= sum(shares) <= 1.001


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"trackers": ("wandb",)}, "the tracker wandb is not installed: pip install wandb"),
        ({"trackers": ("wandbb",)}, "there is no tracker 'wandbb'; did you mean 'wandb'"),
        ({"evaluate_every": 0}, "evaluate_every is 0; it has to be at least 1"),
        ({"clip": {"all": 0.0}}, "clip is 0.0; it has to be positive"),
        ({"accumulate": 0}, "accumulate is 0"),
    ],
)
def test_settings_that_cannot_be_are_said(
    training: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        experiment.TrainingConfig(**training)  # type: ignore[arg-type]


def test_an_evaluation_needs_a_protocol() -> None:
    data = {"name": "x", "algorithm": "bc", "dataset": "d", "training": {"evaluate_every": 5}}
    with pytest.raises(UserError, match=r"here: training\.evaluate_every needs a protocol"):
        experiment.parse(data, "here")


def test_a_checkpoint_of_another_algorithm_is_said(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "r")
    with pytest.raises(UserError, match="of another experiment: its name is 'debug-diffuser', here it is 'debug-bc'"):
        commands.train(experiment.load("debug-bc"), tmp_path / "r", resume=True, quiet=True)


def test_a_folder_that_is_no_run_is_not_overwritten(exp: Experiment, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is not empty and is not overwritten: name another"):
        commands.train(exp, tmp_path, quiet=True)


def test_a_live_run_is_named_by_its_process(tmp_path: Path) -> None:
    with (
        folder.locked(tmp_path / "r", main=True),
        pytest.raises(UserError, match=rf"\(process {os.getpid()} on \S+\): wait"),
        folder.locked(tmp_path / "r", main=True),
    ):
        pass


def test_bad_metrics_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, is no metrics"):
        trackers.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        trackers.read(path)


def test_metrics_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n" + '{"step": 2, "lo')
    assert trackers.read(path) == [{"step": 1, "loss": 2.0}]
    trackers.MetricsFile(path, resume_step=1)
    assert path.read_text() == json.dumps({"step": 1, "loss": 2.0}) + "\n"


def test_the_global_batch_is_what_processes_share(dataset: str) -> None:
    from offline_cai.data import minari
    from offline_cai.data.windows import Windows
    from offline_cai.training.sources import OfflineSource

    windows = Windows(minari.trajectories(dataset), 4, 2)
    whole = OfflineSource(windows, 8, seed=1)(5)
    parts = [OfflineSource(windows, 8, seed=1, rank=r, processes=2)(5) for r in range(2)]
    assert np.array_equal(whole.obs, torch.cat([part.obs for part in parts]))
    assert torch.equal(whole.key, torch.cat([part.key for part in parts]))
