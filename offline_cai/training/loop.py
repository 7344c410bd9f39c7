"""The one training loop: it knows sources, algorithms and steps, and no algorithm by name."""

import json
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from offline_cai import algorithms, config, export
from offline_cai.core import Algorithm, Batch, Source, SourceState
from offline_cai.data import catalogue
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.make import env_spec
from offline_cai.environments.vector import EnvironmentFault
from offline_cai.errors import Interrupted, UserError
from offline_cai.files import write_text
from offline_cai.interrupts import Asked, Interrupt
from offline_cai.provenance import versions
from offline_cai.training import checkpoint, folder, processes, sources
from offline_cai.training.experiment import Experiment, require_same
from offline_cai.training.practice import Abandoned, Practice
from offline_cai.training.state import Diverged, TrainingState
from offline_cai.training.trackers import MetricsFile
from offline_cai.training.watch import Clock, Progress

SLOWEST = 2.0**-5
"""The least slowdown: after that many halvings of the learning rate, `on_divergence: rollback` gives up."""


def train(
    experiment: Experiment,
    output: Path,
    resume: bool = False,
    quiet: bool = False,
    accelerator: Accelerator | None = None,
) -> Path:
    """Train an experiment into the folder `output` and return its last checkpoint.

    Of several processes each calls this alike, with its `accelerator`; the first one writes.

    Raises:
        UserError: the folder exists already (and it is no resume), or dataset, config or checkpoint are at fault.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last complete step was kept.
    """
    accelerator = accelerator or processes.join(experiment.training)
    main = accelerator.is_main_process
    if main and not resume:
        folder.require_new(output)
    with accelerator.local_main_process_first():  # one converts the dataset, the others find it converted
        trajectories = None if experiment.dataset is None else catalogue.trajectories(experiment.dataset)
    algorithm = build(experiment, trajectories)
    processes.require_able(algorithm, experiment.algorithm, accelerator)
    source = sources.build(experiment, algorithm, trajectories, accelerator, output)
    state = TrainingState(algorithm, experiment.training, accelerator)
    with folder.locked(output, main):
        if main and not resume:
            folder.require_new(output)
        draw = None if trajectories is None else partial(sources.sample, experiment, algorithm, trajectories)
        run = _Run(experiment, output, state, source, draw, quiet)
        start = run.load() if resume and checkpoint.checkpoints(output / "checkpoints") else 0
        if start > experiment.training.steps:
            raise UserError(
                f"{output} has done {start} steps already: training.steps cannot be {experiment.training.steps}."
            )
        try:
            run.steps(start)
        finally:
            run.close()
    return checkpoint.find(output)


def build(experiment: Experiment, trajectories: Trajectories | None) -> Algorithm:
    """The algorithm with its initial weights, a function of the seed, and normalisers fitted to the data, if any."""
    if trajectories is not None:
        spec = trajectories.spec
    else:
        assert experiment.environment is not None
        with closing(experiment.environment.make()) as env:
            spec = env_spec(env)
    torch.manual_seed(experiment.seed)
    algorithm = algorithms.find(experiment.algorithm)(spec, experiment.model)
    if trajectories is not None:
        algorithm.fit(trajectories.chunks)
    if experiment.start_from is not None:
        _take_over(algorithm, experiment.start_from)
    return algorithm


def _take_over(algorithm: Algorithm, folder: str) -> None:
    """The actor and the normaliser of an export, by name.

    Raises:
        UserError: it has none, or they are of other shapes.
    """
    parts, path = ("actor.", "normaliser."), export.find(folder)
    tensors = {name: tensor for name, tensor in export.read(path)[1].items() if name.startswith(parts)}
    if not any(name.startswith("actor.") for name in tensors):
        raise UserError(f"start_from: {path} holds no actor: name a run of an algorithm that has one.")
    others = {name: tensor for name, tensor in algorithm.state_dict().items() if not name.startswith(parts)}
    export.assign(algorithm, {**others, **tensors}, f"start_from: {path}")


class _Run:
    """One training from its first step to its last, in one of its processes."""

    def __init__(
        self,
        experiment: Experiment,
        output: Path,
        state: TrainingState,
        source: Source,
        draw: Callable[[int], Batch] | None,
        quiet: bool,
    ) -> None:
        self.experiment, self.output, self.state, self.source = experiment, output, state, source
        self.draw, self.finished = draw, -1
        self.c, self.accelerator = experiment.training, state.accelerator
        self.main = self.accelerator.is_main_process
        self.quiet = quiet or not self.main
        self.practice = Practice.of(experiment, state.algorithm) if self.main else None

    def steps(self, start: int) -> None:
        """The steps from `start` to the last."""
        c, state, step = self.c, self.state, start
        self._open(start)
        self.start, self.clock = start, Clock(start)
        with Interrupt() as self.interrupt:
            self.source.asked = lambda: bool(self.interrupt.asked)
            if start:
                self.evaluate(start)  # a stop may have come between a step and its evaluation
            while step < c.steps and not state.stopping:
                try:
                    values = self.update(step)
                    step += 1
                    self.record(step, values)
                    self.evaluate(step)
                    if state.stopping or step == c.steps or self._due(step, c.checkpoint_every, c.evaluate_every):
                        self.save(step)
                except Diverged as fault:
                    step = self.roll_back(step, fault)
                except Asked:  # in all processes alike, as is the next
                    state.stopping = True
                    self.save(step)
                except EnvironmentFault as fault:
                    self.save(step)
                    with processes.together():
                        self.accelerator.wait_for_everyone()  # the first one writes, and who ends before it ends it
                    raise UserError(
                        f"{fault} What was gathered until then is kept: mend the environment, then go on with: "
                        f"offline-cai train --resume {self.output}"
                    ) from fault
        with processes.together():
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        if step < c.steps:
            raise Interrupted(
                f"stopped at step {step} of {c.steps}. Resume with: offline-cai train --resume {self.output}",
                128 + (self.interrupt.asked or signal.SIGTERM),
            )

    def _open(self, start: int) -> None:
        who = processes.describe(self.c, self.accelerator)
        self.progress = Progress(self.c.steps, start, self.quiet)
        self.progress.say(f"train: {who}")
        if self.main:
            write_text(self.output / "config.yaml", config.dump(self.experiment))
            write_text(self.output / "versions.json", json.dumps(versions() | {"processes": who}, indent=1))
            self.metrics = MetricsFile(self.output / "metrics.jsonl", start)
            self.began = time.monotonic() - self.metrics.seconds
        if self.c.trackers:
            self.accelerator.project_configuration.logging_dir = str(self.output / "tensorboard")
            self.accelerator.init_trackers(self.experiment.name, _flat(self.experiment))

    def _due(self, step: int, *every: int | None) -> bool:
        return any(n is not None and step % n == 0 for n in every)

    def update(self, step: int) -> dict[str, float]:
        """The iteration after `step` steps: a batch, the algorithm's update, the average."""
        state, before = self.state, self.source.seconds
        with self.clock("data"):
            batch = self.source(step).to(self.accelerator.device)
        self.clock.move(self.source.seconds - before, "data", "environment")
        with self.clock("update"):
            state.stop = bool(self.interrupt.asked)
            return state.iterate(step, batch)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """A row of metrics, if one is due, and the progress that people see."""
        if self.c.compile and step == self.start + 1:
            self.progress.say(f"train: compiled, in {sum(self.state.first_call.values()):.1f} s for the first step")
        self.progress.advance(step, values)
        if self.main and (step == self.c.steps or self._due(step, self.c.log_every)):
            rates = self.state.learning_rates(step - 1)
            rate = {"learning_rate": max(rates.values())}
            self._write(step, {**values, **self.source.metrics(), **rate, **self.clock.report(step)})

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        row = {**values, "seconds": time.monotonic() - self.began}
        self.metrics.write(step, row)
        self.accelerator.log(row, step=step)

    def evaluate(self, step: int) -> None:
        """The evaluation at `step`, if one is due, in the first process; it is given up when asked to stop."""
        if self.state.stopping or not self._due(step, self.c.evaluate_every):
            return
        if self.practice is not None and step not in self.metrics.scores:
            with self.clock("evaluation"):
                try:
                    self.finish(step)
                    scores = self.practice(self.state.weights_to_act_with(), self.interrupt)
                    self._write(step, scores)
                    self.progress.say(f"train: step {step}, score {scores['score']:.1f}")
                except Abandoned:
                    pass
                except EnvironmentFault as fault:  # in this process alone, unlike one of the source
                    raise UserError(f"the evaluation at step {step} failed: {fault}") from fault
        self.state.stop = bool(self.interrupt.asked)
        self.state.agree_to_stop()

    def finish(self, step: int) -> None:
        """What goes with the weights of `step`, once; nothing where there are no data."""
        if self.draw is not None and self.finished != step:
            self.state.finish(self.draw)
            self.finished = step

    # Nothing is lost ------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """The checkpoint of `step`.

        Raises:
            Diverged: a weight is not finite; such weights are never saved.
        """
        with self.clock("checkpoint"):
            for name, tensor in self.state.algorithm.state_dict().items():
                if not tensor.isfinite().all():
                    raise Diverged(f"the weight {name} is not finite")
            with processes.together():
                parts = gather_object([self.source.state()])
            if not self.main:
                return
            if step == self.c.steps:
                self.finish(step)
            facts = {name: value for part in parts for name, value in part.facts.items()}
            tensors = {f"source/{name}": value for part in parts for name, value in part.tensors.items()}
            target, algorithm = self.output / "checkpoints", self.state.algorithm
            checkpoint.save(
                target,
                step,
                checkpoint.Export(
                    self.experiment.algorithm, algorithm.config, algorithm.spec, self.state.weights_to_act_with()
                ),
                self.state.tensors() | tensors,
                {"experiment": config.to_dict(self.experiment), "training": self.state.facts(), "source": facts},
            )
            checkpoint.prune(target, step, self.c.keep, self.metrics.best())
            whole = (path for path in checkpoint.checkpoints(target) if not checkpoint.damage(path))
            self.source.prune(checkpoint.source_facts(path) for path in whole)

    def load(self) -> int:
        """Go back to the last checkpoint that is whole; gives its step.

        Raises:
            UserError: it is of another experiment or of other data, or none is whole.
        """
        path = checkpoint.find(self.output)
        tensors, facts = checkpoint.load_state(path)
        require_same(self.experiment, facts["experiment"], path)
        own = {name.removeprefix("source/"): t for name, t in tensors.items() if name.startswith("source/")}
        self.source.load(SourceState(facts["source"], own))
        self.state.load(tensors, facts["training"], str(path))
        return int(facts["step"])

    def roll_back(self, step: int, fault: Diverged) -> int:
        """What `on_divergence` says; gives the step to go on from.

        Raises:
            UserError: to stop, or after too many rollbacks, or with no checkpoint to go back to.
        """
        saved = checkpoint.checkpoints(self.output / "checkpoints")
        slowdown = self.state.slowdown / 2
        if self.c.on_divergence != "rollback" or not saved or slowdown < SLOWEST:
            kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint was written yet"
            raise UserError(
                f"training diverged after {step} steps: {fault}. Lower training.learning_rate or clip, or see "
                f"training.on_divergence; {kept}."
            )
        back = self.load()
        self.state.slowdown = slowdown
        self.progress.say(f"train: after {step} steps {fault}: back to step {back}, learning rate times {slowdown:g}")
        self.clock = Clock(back)
        self.progress.back_to(back)
        if self.main:
            self.metrics.rewind(back)
        return back

    def close(self) -> None:
        self.source.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _flat(experiment: Experiment) -> dict[str, Any]:
    """The config for trackers, which take neither lists nor None."""
    leaves = config.flatten(config.to_dict(experiment))
    return {name: value if isinstance(value, int | float | str) else json.dumps(value) for name, value in leaves}
