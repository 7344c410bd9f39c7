"""Several processes make the same training as one: for every algorithm there is, found by itself."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from offline_cai import algorithms, seeding
from offline_cai.data import catalogue
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows
from offline_cai.errors import UserError
from offline_cai.training import checkpoint, experiment, loop, processes, trackers
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.state import TrainingState

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))
import soak

SETTINGS = [
    *("--training.steps", "200", "--training.log_every", "20", "--training.checkpoint_every", "1000"),
    *("--training.batch_size", "7"),
]


def train(root: Path, name: str, count: int, fault: str = "") -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The state after 200 steps on batches of 7 samples, which 2 processes cannot share evenly, and the metrics."""
    run = soak.Run(root, f"{name}-{count}-{fault}", *SETTINGS, processes=count, config=f"debug-{name}")
    assert run.finish(fault) == 0, run.said()
    rows = trackers.read(run.folder / "metrics.jsonl")
    return load_file(checkpoint.find(run.folder) / "state" / "training.safetensors"), rows


@pytest.mark.parametrize("name", algorithms.names())
def test_two_processes_train_as_one_does(name: str, dataset: str, tmp_path: Path, float64: None) -> None:
    """After 200 steps: in float64 to 1e-9, everything; in float32 to 1e-5, what the loss depends on at all.

    (A bias in front of a GroupNorm has no gradient but rounding errors, which Adam magnifies: in float64 it stays.)
    """
    config = experiment.load(f"debug-{name}")
    begun = loop.build(config, None if config.dataset is None else catalogue.trajectories(dataset)).double()
    if begun.needs.one_process:
        alone = soak.Run(tmp_path, name, *SETTINGS, processes=2, config=f"debug-{name}")
        assert alone.finish() == 2 and f"{name} trains in one process only" in alone.said()
        return
    exact, rows = train(tmp_path, name, 1, "float64")
    shared, rows_of_two = train(tmp_path, name, 2, "float64")
    assert all(torch.allclose(value, shared[key], rtol=0, atol=1e-9) for key, value in exact.items())
    assert {value.dtype for key, value in exact.items() if key.startswith("ema/")} == {torch.float64}
    assert [row["learning_rate"] for row in rows] == [row["learning_rate"] for row in rows_of_two]
    losses, of_two = ([[row[key] for key in row if "loss" in key] for row in them] for them in (rows, rows_of_two))
    assert losses[0] and losses == [pytest.approx(row, rel=1e-9) for row in of_two]
    moved = [key for key, p in begun.named_parameters() if (exact[f"model/{key}"] - p).abs().max() > 1e-6]
    assert len(moved) > 3
    one, two = train(tmp_path, name, 1)[0], train(tmp_path, name, 2)[0]
    for key in moved:
        assert torch.allclose(one[f"model/{key}"], two[f"model/{key}"], rtol=0, atol=1e-5), key


def updated(name: str, store: Trajectories, **training: Any) -> dict[str, torch.Tensor]:
    """The weights after ten updates in this process."""
    torch.manual_seed(0)
    cls = algorithms.find(name)
    algorithm = cls(store.spec, experiment.load(f"debug-{name}").model).double()
    algorithm.fit(store.chunks)
    needs, state = algorithm.needs, TrainingState(algorithm, TrainingConfig(**training), Accelerator(cpu=True))
    windows = Windows(store, needs.horizon, needs.stride, needs.discount, needs.padding)
    for step in range(10):
        items = windows.draw(seeding.rng(0, step), 8)
        algorithm.update(windows.gather(items, seeding.keys(0, step, torch.arange(8))), state)
    return algorithm.state_dict()


@pytest.mark.parametrize("name", algorithms.names())
def test_micro_batches_of_any_size_make_the_same_step(name: str, store: Trajectories, float64: None) -> None:
    whole, parts = updated(name, store), updated(name, store, accumulate=3)
    assert all(torch.allclose(value, parts[key], rtol=0, atol=1e-9) for key, value in whole.items())
    assert any(not torch.equal(value, parts[key]) for key, value in whole.items()), "it was cut"


def test_groups_are_clipped_by_their_own_norms(store: Trajectories) -> None:
    """With a norm of almost nothing for all, or for the phase by name, Adam's epsilon stops the weights."""
    free, by_name = updated("bc", store, clip=None), updated("bc", store, clip={"all": 1e-12})
    for_all = updated("bc", store, clip=1e-12)
    assert all(torch.equal(for_all[key], value) for key, value in by_name.items())
    assert any(not torch.allclose(for_all[key], value, atol=1e-4) for key, value in free.items())
    with pytest.raises(UserError, match=r"training\.clip names critic, but the groups are all\."):
        updated("bc", store, clip={"critic": 1e-12})


@pytest.mark.parametrize(
    ("environment", "training", "words"),
    [
        ({"WORLD_SIZE": "2"}, {"batch_size": 1}, "2 processes cannot share a batch of 1"),
        ({}, {"device": "cuda"}, "training.device is cuda, but PyTorch finds no GPU here"),
        ({}, {}, r"3 processes were asked for, but 1 came up: start them with"),
    ],
)
def test_what_cannot_be_shared_is_said(
    environment: dict[str, str], training: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        processes.join(TrainingConfig(**training), asked=3)


def test_an_algorithm_for_one_process_refuses_more() -> None:
    algorithm = type("A", (), {"needs": type("N", (), {"one_process": True})()})()
    alone, two = (type("P", (), {"num_processes": n})() for n in (1, 2))
    processes.require_able(algorithm, "trpo", alone)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="trpo trains in one process only, and 2 were started"):
        processes.require_able(algorithm, "trpo", two)  # type: ignore[arg-type]


def test_a_precision_that_the_device_lacks_is_said_and_not_used() -> None:
    config = TrainingConfig(mixed_precision="fp16")
    accelerator = processes.join(config)
    assert accelerator.mixed_precision == "no"
    assert processes.describe(config, accelerator).endswith("; no fp16 there, so in float32")


@pytest.mark.parametrize("name", ["bc", "sac"])
def test_the_compiled_loss_is_the_same_loss(name: str, store: Trajectories, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a compilation, but run by the ordinary kernels, which saves most of a minute; noise included."""
    traced = functools.partial(torch.compile, backend="eager")
    plain, calls = updated(name, store), []
    monkeypatch.setattr(torch, "compile", lambda module: calls.append(module) or traced(module))
    compiled = updated(name, store, compile=True)
    assert len(calls) == 1 and all(torch.allclose(value, compiled[key], atol=1e-9) for key, value in plain.items())
