"""Guided planning from a config to a score, on a run of the debug guide."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from offline_cai import commands, evaluation_commands, export, report
from offline_cai.algorithms.guide import Guide
from offline_cai.data import catalogue
from offline_cai.errors import UserError
from offline_cai.training import checkpoint, experiment, sources, trackers


@pytest.fixture(scope="module")
def guided(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.train(experiment.load("debug-guide"), tmp_path_factory.mktemp("guided") / "run", quiet=True)


def test_plans_are_steered_and_weighed(guided: Path, tmp_path: Path) -> None:
    facts = commands.plan(guided, 3, 1, output=tmp_path / "plans")
    assert facts["guide"] == "corrected" and 1 <= facts["effective sample size, mean"] <= 2
    with np.load(tmp_path / "plans" / "plans.npz", allow_pickle=False) as data:
        assert data["rows"].shape == (3, 16, 4) and np.allclose(np.exp(data["log_weight"]).sum(1), 1, atol=1e-5)
        assert np.allclose(data["rows"][:, 0], data["obs"][:, 4:8], atol=1e-4)
    assert {path.name for path in (tmp_path / "plans").iterdir()} == commands.PLAN_FILES


def test_flags_change_how_it_plans(guided: Path, tmp_path: Path) -> None:
    flags = {"planner.particles": "3", "planner.candidates": "1", "planner.guide": "none", "planner.rows": "null"}
    facts = commands.plan(guided, 2, 1, flags, tmp_path / "plans")
    assert facts["guide"] == "none" and np.isfinite(facts["log-evidence, mean, nats"])
    for flag, value, words in (
        ("planner.temperature", "0", "temperature is 0"),
        ("planner.tempreature", "1", "did you mean 'temperature'"),
        ("planner.evidence.goals", "[{target: [1], columns: [9], width: 1}]", "the evidence's columns are"),
        ("planner.rows", "7", "multiple of 2"),
        ("planner.rows", "8", "rows"),
        ("planner.temperature", "1e9", "learned the evidence for"),
        ("seed", "3", "only fields of a planner"),
    ):
        with pytest.raises(UserError, match=words):
            commands.plan(guided, 1, 1, {flag: value}, tmp_path / "refused")


def test_scores_carry_how_it_was_guided(guided: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(guided, copy)
    flags = {"episodes": "2", "references": "[]", "planner.candidates": "1", "planner.temperature": "0.5"}
    data = evaluation_commands.evaluate(copy, flags=flags, quiet=True)
    assert data["planner"]["guide"] == "corrected" and data["planner"]["temperature"] == 0.5
    assert data["guidance"]["guide"] == "corrected" and data["guidance"]["temperature"] == 0.5
    assert "effective sample size, mean" not in data["guidance"], "one plan each has no weights"
    weighed = {"episodes": "2", "references": "[]", "planner.candidates": "1", "planner.particles": "3"}
    found = evaluation_commands.evaluate(copy, flags=weighed, output=tmp_path / "weighed", quiet=True)["guidance"]
    lowest, mean = (found[f"effective sample size, {which}"] for which in ("lowest", "mean"))
    assert 1 <= lowest <= mean <= 3 and np.isfinite(found["log-evidence, mean, nats"])
    assert data["planner"]["rows"] == 16 and data["planner"]["horizon in steps"] == 128
    shutil.rmtree(copy / "evaluation")
    shutil.copytree(tmp_path / "weighed", copy / "evaluation")
    page = report.write(copy).read_text()
    assert "score: planner" in page and "log-evidence, mean, nats" in page
    assert f"{found['effective sample size, mean']:.4g}" in page
    bc = commands.train(experiment.load("debug-bc"), tmp_path / "bc", quiet=True)
    with pytest.raises(UserError, match="only fields of a planner"):
        evaluation_commands.evaluate(bc, flags={"planner.steps": "2"}, quiet=True)


def test_what_is_estimated_after_training_is_in_the_last_export_only(guided: Path) -> None:
    """It is that of the averaged weights; training itself does not see it."""
    saved = checkpoint.checkpoints(guided / "checkpoints")
    first, last = (load_file(export.find(path) / "model.safetensors") for path in saved)
    assert not first["diffuser.residual_variance"].any() and last["diffuser.residual_variance"].all()
    algorithm = Guide.from_pretrained(guided)
    run = experiment.load("debug-guide")
    data = catalogue.trajectories(run.dataset)
    found = algorithm.diffuser.residual_variance.clone()
    algorithm.finish(lambda count: sources.sample(run, algorithm, data, count))
    assert torch.allclose(algorithm.diffuser.residual_variance, found, rtol=1e-4), "of the weights that act"
    with pytest.raises(UserError, match="residual covariance"):
        commands.plan(saved[0], 1, 1, output=guided.parent / "early")


def test_conditioned_states_with_inverse_dynamics_go_the_same_way(dataset: str, tmp_path: Path) -> None:
    run = commands.train(experiment.load("debug-diffuser-conditioned"), tmp_path / "run", quiet=True)
    assert {"loss", "inverse_loss"} <= set(trackers.read(run / "metrics.jsonl")[-1])
    assert commands.plan(run, 2, 1)["rows"] == 8
    data = evaluation_commands.evaluate(run, flags={"episodes": "2", "references": "[]"}, quiet=True)
    assert data["planner"]["plans"] == 2 * 5 and data["planner"]["horizon in steps"] == 32
