"""What training changes, and the one optimiser step that changes it, in one process or in many."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from offline_cai.core import Algorithm, Batch, Loss
from offline_cai.errors import UserError
from offline_cai.export import assign
from offline_cai.training.experiment import TrainingConfig
from offline_cai.training.processes import together
from offline_cai.training.vectors import Vector

MOST_SKIPPED = 100
"""Updates in a row that `on_divergence: skip` leaves out before it gives up."""
GRADIENT_LIMIT = 1e8
"""A norm of the gradient above this is an explosion."""


class Diverged(Exception):
    """A number of a step is not finite, or its gradient exploded; the weights are still those from before the step."""


class TrainingState:
    """Weights, their average and the optimisers. Called, it is the `Step` of core.py.

    Every process holds all of it. The gradients of a phase's group, and the sums that its loss is made of, are added up
    over micro-batches and processes in one reduction, and divided by the count of them all. So any number of processes
    makes the same step, and a phase that leaves other groups without gradients costs them nothing. Where a loss leaves
    out a parameter of its own group, which another part of the batch may use, the gradient is zero: its moments decay,
    and it goes on by them.

    Attributes:
        stop: set to 1 to ask all processes to stop; `stopping` is true in all of them from the next step on.
        slowdown: a factor on the learning rate, halved by each rollback.
        first_call: seconds of the first step of each phase, compilation included.
    """

    def __init__(self, algorithm: Algorithm, training: TrainingConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.algorithm = training, accelerator, algorithm.to(accelerator.device)
        if accelerator.num_processes > 1:  # machines may differ in the last bits of what they fitted
            broadcast(list(algorithm.state_dict().values()))
        self.module = torch.compile(algorithm) if training.compile else algorithm
        self.optimisers: dict[str, Any] = {}
        self.vectors: dict[str, Vector] = {}
        named = dict(algorithm.named_parameters())
        for phase, prefixes in algorithm.needs.groups.items():
            group = [p for name, p in named.items() if name.startswith(prefixes) and p.requires_grad]
            vector = self.vectors[phase] = Vector(group)
            optimiser = torch.optim.AdamW(
                [vector.values], lr=training.rate(phase), weight_decay=training.weight_decay, fused=True
            )
            self.optimisers[phase] = optimiser if accelerator.scaler is None else accelerator.prepare(optimiser)
        exact = accelerator.mixed_precision == "no" and not training.compile and training.accumulate == 1
        self._by_hand = exact and accelerator.device.type == "cpu"
        self._averaged, self._averages, self.ema = self._to_average() if training.ema else ([], [], [])
        self.slowdown, self.skipped, self.skipped_in_a_row = 1.0, 0, 0
        self.stop, self.stopping = 0, False
        for field in ("clip", "learning_rate"):
            value, groups = getattr(training, field), algorithm.needs.groups
            if isinstance(value, Mapping) and (unknown := set(value) - set(groups)):
                raise UserError(
                    f"training.{field} names {', '.join(sorted(unknown))}, but the groups are {', '.join(groups)}."
                )
        self.first_call: dict[str, float] = {}

    def _to_average(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What is averaged, in as few tensors as can be; the averages; and these again, for each parameter."""
        parameters: list[Tensor] = list(self.algorithm.parameters())
        vectors = list(self.vectors.values())
        grouped = {id(p) for vector in vectors for p in vector.parameters}
        others = [p for p in parameters if id(p) not in grouped]
        averaged = [*(vector.values for vector in vectors), *others]
        averages = [x.detach().clone() for x in averaged]
        of = {id(p): average for p, average in zip(others, averages[len(vectors) :], strict=True)}
        for vector, average in zip(vectors, averages, strict=False):
            of |= {id(p): part for p, part in zip(vector.parameters, vector.parts(average), strict=True)}
        return averaged, averages, [of[id(p)] for p in parameters]

    def __call__(self, batch: Batch, phase: str = "all") -> dict[str, float]:
        """One step on the parameters of a phase; the means of the loss's terms and metrics, and the gradient's norm.

        Raises:
            Diverged: a term or the gradient is not finite, or exploded, and such steps are not to be skipped.
        """
        began, optimiser = time.perf_counter(), self.optimisers[phase]
        sums, entries = self._backward(batch, phase)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(optimiser)
        count = float(entries)
        *totals, norm = _numbers([*sums.values(), self._clip(phase)])
        values = {name: total / count if count else math.nan for name, total in zip(sums, totals, strict=True)}
        norms = {"grad_norm" if len(self.optimisers) == 1 else f"{phase}_grad_norm": norm}
        if self._allowed(values, norms):
            self._apply(optimiser)
        self.first_call.setdefault(phase, time.perf_counter() - began)
        values |= norms | ({"skipped": self.skipped} if self.skipped else {})
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def iterate(self, step: int, batch: Batch) -> dict[str, float]:
        """All that is done with the batch that follows `step` steps: the algorithm's update, then the average.

        Raises:
            Diverged: as a step does.
        """
        self.set_learning_rates(step)
        values = self.algorithm.update(batch, self)
        self.average()
        return values

    def _backward(self, batch: Batch, phase: str) -> tuple[dict[str, Tensor], Tensor | int]:
        """Leaves the gradient of the mean loss in the parameters; gives the sums to report, by name, and their count.

        All parts of this process's batch are divided by one number, `unit`, which is the count itself where there is
        one part and one process.
        """
        unit, losses = None, []
        for part in batch.split(self.config.accumulate) if self.config.accumulate > 1 else [batch]:
            samples = max(len(part.key), 1)
            with torch.no_grad():
                by_hand = self.algorithm.by_hand(part, phase, samples) if self._by_hand else None
            loss, unit = self._by_autograd(part, phase, unit) if by_hand is None else (by_hand, samples)
            losses.append(loss)
        assert unit is not None
        if self.accelerator.num_processes > 1 or self.config.accumulate > 1:
            return self._add_up(phase, unit, losses)
        self.stopping |= bool(self.stop)
        return {**loss.terms, **loss.metrics}, loss.entries

    def _by_autograd(self, part: Batch, phase: str, unit: Tensor | int | None) -> tuple[Loss, Tensor | int]:
        """Adds the gradient of a part's loss / unit to that of the parts before it; the first part finds the unit."""
        if unit is None:
            self.vectors[phase].gradient.zero_()
        with self.accelerator.autocast():
            loss = self.module(part, phase)
        unit = max(loss.entries, 1) if unit is None else unit  # a part may have none
        mean, scaler = reduce(add, loss.terms.values()) / unit, self.accelerator.scaler
        (mean if scaler is None else scaler.scale(mean)).backward(inputs=self.vectors[phase].parameters)
        return loss, unit

    def _add_up(self, phase: str, unit: Tensor | int, losses: list[Loss]) -> tuple[dict[str, Tensor], Tensor]:
        """The sums and the count over all parts and processes; the gradients become those of the global mean."""
        gradient, names = self.vectors[phase].gradient, [*losses[0].terms, *losses[0].metrics]
        rows = ([*loss.terms.values(), *loss.metrics.values(), torch.as_tensor(loss.entries)] for loss in losses)
        parts = torch.stack([torch.stack([x.detach().to(gradient) for x in row]) for row in rows])
        total = self.sum(torch.cat([gradient * unit, parts.sum(0), gradient.new_tensor([self.stop])]))
        summed, (*sums, count, stop) = total[: len(gradient)], total[len(gradient) :]
        torch.div(summed, count, out=gradient)
        self.stopping |= bool(stop > 0)
        return dict(zip(names, sums, strict=True)), count

    def sum(self, tensor: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor.detach()
        with together():
            return self.accelerator.reduce(tensor.detach(), "sum")

    def agree_to_stop(self) -> bool:
        """Whether any process was asked to stop: all of them have to ask this at the same place."""
        self.stopping |= bool(self.sum(torch.tensor([self.stop], device=self.accelerator.device)) > 0)
        return self.stopping

    def _clip(self, phase: str) -> Tensor:
        """Scales the phase's gradients to the largest norm allowed, if any, and gives the norm that they had."""
        gradient, clip = self.vectors[phase].gradient, self.config.clip
        norm = torch.linalg.vector_norm(gradient)
        most = clip.get(phase) if isinstance(clip, Mapping) else clip
        if most is not None:
            gradient.mul_((most / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def _apply(self, optimiser: Any) -> None:
        """The optimiser's step.

        Where there is nothing else to it, AdamW's fused kernel is called directly: what torch does around it takes
        longer than it does, for small networks. The first step makes the moments.
        """
        group = optimiser.param_groups[0]
        (values,) = group["params"]
        if self.accelerator.device.type != "cpu" or values not in optimiser.state:
            optimiser.step()
            return
        state = optimiser.state[values]
        state["step"] += 1
        torch._fused_adamw_(
            [values],
            [values.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def _allowed(self, values: dict[str, float], norms: dict[str, float]) -> bool:
        """Whether the optimiser may step.

        A norm that is not finite is an everyday matter where a gradient scaler (fp16) seeks its scale: it skips itself.
        """
        fault = next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)
        scaled = self.accelerator.scaler is not None
        if fault is None:
            large = (name for name, x in norms.items() if not x <= GRADIENT_LIMIT and (math.isfinite(x) or not scaled))
            fault = next((f"{name} is {norms[name]:.3g}" for name in large), None)
        if fault is None:
            self.skipped_in_a_row = 0
            return True
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.config.on_divergence != "skip" or self.skipped_in_a_row > MOST_SKIPPED:
            raise Diverged(fault)
        return False

    def learning_rates(self, step: int) -> dict[str, float]:
        """By phase: functions of the optimiser step (and of the rollbacks), so there is no scheduler's state."""
        c = self.config
        warm = min(1.0, (step + 1) / max(c.warmup, 1))
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / c.steps)) if c.schedule == "cosine" else 1.0
        return {phase: c.rate(phase) * warm * decay * self.slowdown for phase in self.optimisers}

    def set_learning_rates(self, step: int) -> None:
        for phase, rate in self.learning_rates(step).items():
            for group in self.optimisers[phase].param_groups:
                group["lr"] = rate

    @torch.no_grad()
    def average(self) -> None:
        if self.ema:
            torch._foreach_lerp_(self._averages, self._averaged, 1 - self.config.ema)

    def weights_to_act_with(self) -> dict[str, Tensor]:
        """The algorithm's state with averaged parameters."""
        names = (name for name, _ in self.algorithm.named_parameters())
        return {**self.algorithm.state_dict(), **dict(zip(names, self.ema, strict=False))}

    def finish(self, draw: Callable[[int], Batch]) -> None:
        """Let the algorithm estimate what goes with its averaged weights; its raw ones are as before."""
        parameters: list[Tensor] = list(self.algorithm.parameters())
        raw = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            if self.ema:
                torch._foreach_copy_(parameters, self.ema)
            self.algorithm.eval()
            self.algorithm.finish(draw)
            self.algorithm.train()
            torch._foreach_copy_(parameters, raw)

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Raw weights, the average and the optimisers' moments, by name."""
        out = {f"model/{name}": tensor for name, tensor in self.algorithm.state_dict().items()}
        out |= {f"ema/{i:05d}": tensor for i, tensor in enumerate(self.ema)}
        for phase, optimiser in self.optimisers.items():
            vector = self.vectors[phase]
            for name, moment in optimiser.state_dict()["state"].get(0, {}).items():
                parts = vector.parts(moment) if moment.ndim else [moment.clone() for _ in vector.parameters]
                out |= {f"optimiser/{phase}/{i:05d}/{name}": part for i, part in enumerate(parts)}
        return out

    def facts(self) -> dict[str, Any]:
        """The rest of it, as JSON."""
        scaler = self.accelerator.scaler
        return {
            "slowdown": self.slowdown,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], where: str) -> None:
        """Take up what `tensors` and `facts` gave.

        Raises:
            UserError: names the first tensor that is missing, unknown or of another shape.
        """
        own = self.tensors()
        optimised = {name.split("/")[1] for name in tensors if name.startswith("optimiser/")}
        if not optimised <= set(self.optimisers):
            raise UserError(
                f"{where} holds the optimisers of {', '.join(sorted(optimised))}, and this algorithm's are those of "
                f"{', '.join(self.optimisers)}: another version wrote it. It can be evaluated, but not resumed here."
            )
        assign(self.algorithm, _below(tensors, "model/"), where)
        for name, average in _below(own, "ema/").items():
            average.copy_(tensors[f"ema/{name}"])
        for phase, optimiser in self.optimisers.items():
            vector, parts = self.vectors[phase], _below(tensors, f"optimiser/{phase}/")
            moments: dict[str, Tensor] = {}
            for name in {name.split("/")[1] for name in parts}:
                of_each = [parts.get(f"{i:05d}/{name}") for i in range(len(vector.parameters))]
                known = next(part for part in of_each if part is not None)
                moments[name] = known if name == "step" else vector.joined(of_each)
            optimiser.load_state_dict({**optimiser.state_dict(), "state": {0: moments} if moments else {}})
        self.slowdown, self.skipped = facts["slowdown"], facts["skipped"]
        self.skipped_in_a_row = facts["skipped_in_a_row"]
        if facts["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _numbers(tensors: Sequence[Tensor]) -> list[float]:
    """The values of scalars: one by one on a CPU, where that is fastest, and else in one transfer."""
    if tensors[-1].is_cpu:
        return [tensor.item() for tensor in tensors]
    return torch.stack([tensor.detach().to(tensors[-1]) for tensor in tensors]).tolist()
