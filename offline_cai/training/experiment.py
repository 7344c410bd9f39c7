"""The config of one experiment: what `offline-cai train CONFIG` reads."""

import math
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from offline_cai import algorithms, config
from offline_cai.errors import UserError, did_you_mean
from offline_cai.training.online import Simulation

TRACKERS = ("tensorboard", "trackio", "wandb")


@dataclass(frozen=True)
class TrainingConfig:
    """The shared loop."""

    steps: int = 3000
    """Optimiser steps."""
    batch_size: int = 64
    """Windows per step, over all processes."""
    accumulate: int = 1
    """Micro-batches that a process cuts its part of a batch into, one after the other, to save memory."""
    learning_rate: float | dict[str, float] = 1e-3
    """Adam's learning rate at its highest, one for all parameter groups or one for each by phase."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Decay of the learning rate: cosine to 2 %, or constant."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip: float | dict[str, float] | None = 1.0
    """Largest norm of the gradient of each parameter group, one for all or by phase; null: no clipping."""
    ema: float = 0.995
    """Decay of the averaged weights per step, which are the ones that act; 0: no averaging."""
    log_every: int = 50
    """Steps between lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step and those with an evaluation always have one."""
    keep: int = 2
    """Last checkpoints to keep; the one with the best evaluation is kept besides."""
    evaluate_every: int | None = None
    """Steps between evaluations in the protocol's environment, on starts of their own; null: none while training."""
    evaluate_episodes: int = 10
    """Episodes of each of these evaluations."""
    on_divergence: Literal["stop", "skip", "rollback"] = "stop"
    """When a loss is not finite or a gradient explodes: stop, skip the update (100 in a row at most), or go back to the
    last checkpoint with half the learning rate (5 times at most)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto: on the GPU if there is one."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward pass, by Accelerate; a device that lacks it computes in float32."""
    tf32: bool = False
    """Whether float32 matrix products may use TF32 on GPUs that have it."""
    compile: bool = False
    """Whether torch.compile compiles the loss; the seconds that it takes are reported."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl: tensorboard, trackio, wandb, or none."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep", "evaluate_episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}; it has to be in [0, 1).")
        rates = self.learning_rate.values() if isinstance(self.learning_rate, dict) else [self.learning_rate]
        if not all(0 < rate < math.inf for rate in rates) or not 0 <= self.weight_decay < math.inf or self.warmup < 0:
            raise UserError("learning_rate has to be a positive number, weight_decay and warmup at least zero.")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise UserError(f"evaluate_every is {self.evaluate_every}; it has to be at least 1, or null for never.")
        for clip in self.clip.values() if isinstance(self.clip, dict) else [self.clip]:
            if clip is not None and not clip > 0:
                raise UserError(f"clip is {clip}; it has to be positive, or null for no clipping.")
        for name in self.trackers:
            if name not in TRACKERS:
                raise UserError(f"there is no tracker {name!r}; {did_you_mean(name, TRACKERS)}")
            if find_spec(name) is None:
                raise UserError(
                    f"the tracker {name} is not installed: pip install {name}, or leave it out of trackers."
                )

    def rate(self, phase: str) -> float:
        """The highest learning rate of a phase.

        Raises:
            UserError: it is missing among those by phase.
        """
        if not isinstance(self.learning_rate, dict):
            return self.learning_rate
        if phase not in self.learning_rate:
            raise UserError(f"training.learning_rate has none for {phase}; it has {', '.join(self.learning_rate)}.")
        return self.learning_rate[phase]


@dataclass(frozen=True)
class Experiment:
    """One experiment: an algorithm, a dataset, how it is trained and where it is evaluated."""

    name: str
    """Name of the experiment; results go to runs/NAME/DATE-TIME."""
    algorithm: str
    """A file in algorithms/."""
    dataset: str | None = None
    """Minari id, D4RL name, or path of a D4RL file (.hdf5) or of own arrays (.npz). Algorithms with a replay may do
    without."""
    environment: Simulation | None = None
    """The environment that online algorithms gather their data in."""
    protocol: str | None = None
    """Evaluation protocol: a recipe in eval/."""
    seed: int = 0
    """Seed of everything that is random."""
    start_from: str | None = None
    """A run, a checkpoint or an export whose actor and normaliser are taken over before the first step."""
    model: Any = None
    """The algorithm's own config."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The shared loop."""

    @property
    def data(self) -> str:
        """The dataset's name.

        Raises:
            UserError: the experiment has none.
        """
        if self.dataset is None:
            raise UserError(f"the experiment {self.name!r} has no dataset, and this needs one.")
        return self.dataset


def load(name: str, flags: dict[str, str] | None = None) -> Experiment:
    """An experiment from a config's name or path, with flags such as {"training.steps": "100"} over it.

    Raises:
        UserError: no such file, an unknown key (with a suggestion), a value of another type.
    """
    path = config.find(name, "configs")
    data = config.override(config.read(path), flags or {})
    return parse(data, str(path))


RESUMABLE = (
    *("environment.workers", "environment.timeout"),
    *("training.steps", "training.log_every", "training.checkpoint_every", "training.keep", "training.evaluate_every"),
    *("training.evaluate_episodes", "training.on_divergence", "training.device", "training.trackers"),
)
"""What a resume may change: the run stays the same run, only longer, or watched and saved in another way."""


def require_same(experiment: Experiment, saved: dict[str, Any], where: Path) -> None:
    """Compare an experiment with that of a checkpoint.

    Raises:
        UserError: names the first field that differs, and is not one that a resume may change.
    """
    ours, theirs = (dict(config.flatten(data)) for data in (config.to_dict(experiment), saved))
    for name in (*ours, *theirs):
        if name not in RESUMABLE and ours.get(name) != theirs.get(name):
            raise UserError(
                f"{where} is of another experiment: its {name} is {theirs.get(name)!r}, here it is {ours.get(name)!r}. "
                "Resume with the config that the run was started with, or start a new run."
            )


def parse(data: dict[str, Any], where: str) -> Experiment:
    if not isinstance(data.get("algorithm"), str):
        raise UserError(f"{where}: the key 'algorithm' has to name one of {', '.join(algorithms.names())}.")
    model: Any = config.build(algorithms.find(data["algorithm"]).Config, data.get("model") or {}, f"{where}: model")
    plain = {key: value for key, value in data.items() if key != "model"}
    experiment = config.build(Experiment, plain, where)
    if experiment.protocol is not None:
        config.find(experiment.protocol, "eval")
    elif experiment.training.evaluate_every is not None:
        raise UserError(f"{where}: training.evaluate_every needs a protocol: name one of eval/.")
    if experiment.dataset is None and experiment.environment is None:
        raise UserError(f"{where}: name a dataset, or an environment (environment.id) for what gathers its own data.")
    if not 0 <= experiment.seed < 2**63:
        raise UserError(f"{where}: seed is {experiment.seed}; it has to be from 0 to 2^63 - 1.")
    return Experiment(**{**{f.name: getattr(experiment, f.name) for f in fields(Experiment)}, "model": model})
