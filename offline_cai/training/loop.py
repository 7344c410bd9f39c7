"""The one training loop: it knows sources, algorithms and steps, and no algorithm by name."""

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from offline_cai import algorithms, config
from offline_cai.core import Algorithm, Batch, Source
from offline_cai.data import catalogue
from offline_cai.data.trajectories import Trajectories, digests
from offline_cai.data.windows import Windows
from offline_cai.errors import Interrupted, UserError
from offline_cai.files import write_text
from offline_cai.interrupts import Interrupt
from offline_cai.provenance import versions
from offline_cai.training import checkpoint
from offline_cai.training.experiment import Experiment, TrainingConfig
from offline_cai.training.sources import OfflineSource
from offline_cai.training.trackers import MetricsFile


def train(experiment: Experiment, output: Path, resume: bool = False, quiet: bool = False) -> Path:
    """Train an experiment into the folder `output` and return its last checkpoint.

    Raises:
        UserError: the folder exists already (and it is no resume), or dataset, config or checkpoint are at fault.
        Interrupted: Ctrl-C; a checkpoint of the last complete step was kept.
    """
    c, accelerator = experiment.training, _accelerator(experiment, output)
    if not resume:
        _require_new(output)
    trajectories = catalogue.trajectories(experiment.dataset)
    algorithm = build(experiment, trajectories)
    needs = algorithm.needs
    windows = Windows(trajectories, needs.horizon, needs.stride, needs.discount, needs.padding)
    state = TrainingState(algorithm, c, accelerator)
    data = None if trajectories.path is None else digests(trajectories.path)["rows"]
    source = OfflineSource(windows, c.batch_size, experiment.seed, data=data)
    with _only_one(output):
        if not resume:
            _require_new(output)
        start = state.resume(output, source) if resume else 0
        if start > c.steps:
            raise UserError(f"{output} has done {start} steps already: training.steps cannot be {c.steps}.")
        write_text(output / "config.yaml", config.dump(experiment))
        write_text(output / "versions.json", json.dumps(versions(), indent=1))
        return _steps(experiment, output, algorithm, state, source, start, quiet)


def _steps(
    experiment: Experiment,
    output: Path,
    algorithm: Algorithm,
    state: "TrainingState",
    source: Source,
    start: int,
    quiet: bool,
) -> Path:
    """The steps from `start` to the last; returns the last checkpoint."""
    c, accelerator = experiment.training, state.accelerator
    metrics = MetricsFile(output / "metrics.jsonl", start)
    if c.trackers:
        accelerator.init_trackers("tensorboard", _flat(experiment))

    def save(step: int) -> Path:
        _require_finite({name: bool(t.isfinite().all()) for name, t in algorithm.state_dict().items()}, step, output)
        export = checkpoint.Export(experiment.algorithm, experiment.model, algorithm.spec, state.weights_to_act_with())
        return checkpoint.save(
            output / "checkpoints", step, export, state.tensors(), {"source": source.state()}, c.keep
        )

    step, path, began = start, None, time.monotonic() - metrics.seconds
    progress = tqdm(total=c.steps, initial=start, desc="train", unit="step", disable=quiet, dynamic_ncols=True)
    with Interrupt() as interrupt, progress:
        while step < c.steps:
            state.set_learning_rate(step)
            metrics_of_step = algorithm.update(source(step).to(accelerator.device), state)
            step += 1
            state.average()
            progress.update()
            if step % c.log_every == 0 or step == c.steps:
                values = {name: float(value) for name, value in metrics_of_step.items()}
                values |= {"learning_rate": state.learning_rate(step - 1), "seconds": time.monotonic() - began}
                _require_finite({name: math.isfinite(value) for name, value in values.items()}, step, output)
                metrics.write(step, values)
                accelerator.log(values, step=step)
                progress.set_postfix({"loss": f"{values.get('loss', math.nan):.4f}"})
            if interrupt.asked or step % c.checkpoint_every == 0 or step == c.steps:
                path = save(step)
            if interrupt.asked:
                break
    metrics.close()
    source.close()
    accelerator.end_training()
    if interrupt.asked and step < c.steps:
        raise Interrupted(f"stopped at step {step} of {c.steps}. Resume with: offline-cai train --resume {output}")
    return path or checkpoint.find(output)


def build(experiment: Experiment, trajectories: Trajectories) -> Algorithm:
    """The algorithm with its initial weights, a function of the seed, and normalisers fitted to the data."""
    torch.manual_seed(experiment.seed)
    algorithm = algorithms.find(experiment.algorithm)(trajectories.spec, experiment.model)
    algorithm.fit(trajectories.chunks)
    return algorithm


def _accelerator(experiment: Experiment, output: Path) -> Accelerator:
    c = experiment.training
    accelerator = Accelerator(mixed_precision=c.mixed_precision, log_with=list(c.trackers), project_dir=str(output))
    processes = max(accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1")))
    if processes > 1:
        raise UserError(f"{processes} processes were started, but this version trains in one process only.")
    return accelerator


def _require_new(output: Path) -> None:
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= {".lock"}):
        raise UserError(
            f"the output folder {output} is not empty and is not overwritten. Name another with --output, remove it, "
            f"or go on with its training: offline-cai train --resume {output}"
        )


@contextmanager
def _only_one(output: Path) -> Iterator[None]:
    """The run's folder, locked while this process trains in it; the lock ends with the process, however it ends."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (output / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
    except BlockingIOError:
        raise UserError(f"another process is training into {output}: wait for it, or name another --output.") from None


def _flat(experiment: Experiment) -> dict[str, Any]:
    """The config for trackers, which take neither lists nor None."""
    leaves = config.flatten(config.to_dict(experiment))
    return {name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in leaves}


def _require_finite(finite: Mapping[str, bool], step: int, output: Path) -> None:
    for name, is_finite in finite.items():
        if not is_finite:
            saved = checkpoint.checkpoints(output / "checkpoints")
            kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
            raise UserError(
                f"training diverged: {name} is not finite at step {step}. Lower training.learning_rate; {kept}."
            )


class TrainingState:
    """What training changes: weights, their average and the optimisers. Called, it is the `Step` of core.py."""

    def __init__(self, algorithm: Algorithm, training: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.algorithm = training, accelerator, algorithm
        named = dict(algorithm.named_parameters())
        self.module = accelerator.prepare(algorithm)
        self.optimisers: dict[str, Any] = {}
        self.parameters: dict[str, list[Tensor]] = {}
        for phase, prefixes in algorithm.needs.groups.items():
            self.parameters[phase] = [p for name, p in named.items() if name.startswith(prefixes)]
            optimiser = torch.optim.AdamW(
                self.parameters[phase], lr=training.learning_rate, weight_decay=training.weight_decay
            )
            self.optimisers[phase] = accelerator.prepare(optimiser)
        self.ema = [p.detach().clone() for p in named.values()] if training.ema else []

    def __call__(self, batch: Batch, phase: str = "all") -> dict[str, Tensor]:
        optimiser = self.optimisers[phase]
        optimiser.zero_grad(set_to_none=True)
        loss, metrics = self.module(batch, phase)
        self.accelerator.backward(loss)
        values = dict(metrics)
        if self.config.clip is not None:
            values["grad_norm"] = self.accelerator.clip_grad_norm_(self.parameters[phase], self.config.clip)
        optimiser.step()
        return values

    def learning_rate(self, step: int) -> float:
        """A function of the optimiser step alone, so a resumed run needs no scheduler's state."""
        c = self.config
        warm = min(1.0, (step + 1) / max(c.warmup, 1))
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / c.steps)) if c.schedule == "cosine" else 1.0
        return c.learning_rate * warm * decay

    def set_learning_rate(self, step: int) -> None:
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = self.learning_rate(step)

    def average(self) -> None:
        if self.ema:
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.algorithm.parameters()], 1 - self.config.ema)

    def weights_to_act_with(self) -> dict[str, Tensor]:
        """The algorithm's state with averaged parameters."""
        names = (name for name, _ in self.algorithm.named_parameters())
        return {**self.algorithm.state_dict(), **dict(zip(names, self.ema, strict=False))}

    # Saving and resuming -------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Raw weights, the average and the optimisers' moments, by name."""
        out = {f"model/{name}": tensor for name, tensor in self.algorithm.state_dict().items()}
        out |= {f"ema/{i:05d}": tensor for i, tensor in enumerate(self.ema)}
        for phase, optimiser in self.optimisers.items():
            for i, moments in optimiser.state_dict()["state"].items():
                out |= {f"optimiser/{phase}/{i:05d}/{name}": torch.as_tensor(value) for name, value in moments.items()}
        return out

    def resume(self, output: Path, source: Source) -> int:
        """Load the last checkpoint of a run, in place, and return its step; 0 if the run has none yet."""
        if not checkpoint.checkpoints(output / "checkpoints"):
            return 0
        path = checkpoint.find(output)
        tensors, state = checkpoint.load_state(path)
        source.load(state["source"])
        model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
        checkpoint.assign(self.algorithm, model, str(path))
        for i, average in enumerate(self.ema):
            average.copy_(tensors[f"ema/{i:05d}"])
        for phase, optimiser in self.optimisers.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith(f"optimiser/{phase}/"):
                    index, key = name.rsplit("/", 2)[1:]
                    moments.setdefault(int(index), {})[key] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
        return int(state["step"])
