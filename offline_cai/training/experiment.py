"""The config of one experiment: what `offline-cai train CONFIG` reads."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from offline_cai import algorithms, config
from offline_cai.errors import UserError, did_you_mean


@dataclass(frozen=True)
class TrainingConfig:
    """The shared loop."""

    steps: int = 3000
    """Optimiser steps."""
    batch_size: int = 64
    """Windows per step, over all processes."""
    learning_rate: float = 1e-3
    """Adam's learning rate at its highest."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Decay of the learning rate: cosine to 2 %, or constant."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip: float | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    ema: float = 0.995
    """Decay of the averaged weights per step, which are the ones that act; 0: no averaging."""
    log_every: int = 50
    """Steps between lines of metrics."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints to keep."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision of the forward pass, by Accelerate (bf16 is slow on CPUs that have no instructions for it)."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers beside metrics.jsonl: tensorboard, or none."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it has to be at least 1.")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema is {self.ema}; it has to be in [0, 1).")
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf or self.warmup < 0:
            raise UserError("learning_rate has to be a positive number, weight_decay and warmup at least zero.")
        if self.clip is not None and not self.clip > 0:
            raise UserError(f"clip is {self.clip}; it has to be positive, or null for no clipping.")
        for name in self.trackers:
            if name != "tensorboard":
                raise UserError(f"there is no tracker {name!r}; {did_you_mean(name, ['tensorboard'])}")


@dataclass(frozen=True)
class Experiment:
    """One experiment: an algorithm, a dataset, how it is trained and where it is evaluated."""

    name: str
    """Name of the experiment; results go to runs/NAME/DATE-TIME."""
    algorithm: str
    """A file in algorithms/."""
    dataset: str
    """Minari id, D4RL name, or path of a D4RL file (.hdf5)."""
    protocol: str | None = None
    """Evaluation protocol: a recipe in eval/."""
    seed: int = 0
    """Seed of everything that is random."""
    model: Any = None
    """The algorithm's own config."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """The shared loop."""


def load(name: str, flags: dict[str, str] | None = None) -> Experiment:
    """An experiment from a config's name or path, with flags such as {"training.steps": "100"} over it.

    Raises:
        UserError: no such file, an unknown key (with a suggestion), a value of another type.
    """
    path = config.find(name, "configs")
    data = config.override(config.read(path), flags or {})
    return parse(data, str(path))


def parse(data: dict[str, Any], where: str) -> Experiment:
    if not isinstance(data.get("algorithm"), str):
        raise UserError(f"{where}: the key 'algorithm' has to name one of {', '.join(algorithms.names())}.")
    model: Any = config.build(algorithms.find(data["algorithm"]).Config, data.get("model") or {}, f"{where}: model")
    plain = {key: value for key, value in data.items() if key != "model"}
    experiment = config.build(Experiment, plain, where)
    if experiment.protocol is not None:
        config.find(experiment.protocol, "eval")
    if not 0 <= experiment.seed < 2**63:
        raise UserError(f"{where}: seed is {experiment.seed}; it has to be from 0 to 2^63 - 1.")
    return Experiment(**{**{f.name: getattr(experiment, f.name) for f in fields(Experiment)}, "model": model})
