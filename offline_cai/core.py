"""The types that everything is made of, on one page.

Shapes: N environments or plans, B windows of a batch, H blocks of a window, k time steps of a block (the stride), R
rows of a plan, O and A the widths of an observation and an action, D the width of a row in a model's own space.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from offline_cai import config, export
from offline_cai.errors import UserError, did_you_mean

MOST_CHOICES = 100_000  # joint ones: a layer of 256 units before them has 26 million weights


class Field(NamedTuple):
    """One named part of an observation."""

    name: str
    width: int


@dataclass(frozen=True)
class Box:
    """Raw bounds of a continuous action, one number per component, in the environment's units."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        for i, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not -np.inf < low < high < np.inf:
                raise UserError(
                    f"action component {i} has bounds [{low}, {high}], but actors work in [-1, 1] and need finite "
                    "bounds with low < high. Rescale the environment's action space (gymnasium.wrappers.RescaleAction)."
                )


@dataclass(frozen=True)
class Discrete:
    """A categorical action: for each component one of `n` whole numbers from `start` on. Stored as they are."""

    n: tuple[int, ...]
    start: tuple[int, ...]

    def __post_init__(self) -> None:
        for i, (n, start) in enumerate(zip(self.n, self.start, strict=True)):
            if n < 1 or max(abs(start), abs(start + n)) > 1 << 24:
                raise UserError(
                    f"action component {i} has {n} choices from {start} on; there has to be one at least, and none "
                    "beyond 2^24, where float32 no longer tells whole numbers apart."
                )

    @property
    def low(self) -> tuple[int, ...]:
        return self.start

    @property
    def high(self) -> tuple[int, ...]:
        return tuple(start + n - 1 for n, start in zip(self.n, self.start, strict=True))


@dataclass(frozen=True)
class Spec:
    """What a dataset, an environment and an export agree on. `dt` is in seconds per step, None if time has no unit."""

    obs: tuple[Field, ...]
    action: Box | Discrete
    dt: float | None = None

    @property
    def box(self) -> Box:
        """The bounds of continuous actions.

        Raises:
            UserError: the actions are choices.
        """
        if isinstance(self.action, Discrete):
            choices = " x ".join(map(str, self.action.n))
            raise UserError(f"the actions are choices ({choices}), but continuous actions are needed here.")
        return self.action

    @property
    def obs_width(self) -> int:
        return sum(part.width for part in self.obs)

    @property
    def action_width(self) -> int:
        return len(self.action.low)

    def columns(self, *names: str) -> list[int]:
        """The columns of the named fields in a flat observation, in the order of the names.

        Raises:
            UserError: there is no field of that name.
        """
        starts, start = {}, 0
        for part in self.obs:
            starts[part.name] = range(start, start + part.width)
            start += part.width
        for name in names:
            if name not in starts:
                raise UserError(f"the observation has no field {name!r}; {did_you_mean(name, starts)}")
        return [column for name in names for column in starts[name]]

    @property
    def unit_width(self) -> int:
        """The width U of an action in unit space: A, or the number of joint choices.

        Raises:
            UserError: joint choices that are too many for an output each.
        """
        if not isinstance(self.action, Discrete):
            return self.action_width
        if (count := math.prod(self.action.n)) > MOST_CHOICES:
            raise UserError(
                f"the action has {' x '.join(map(str, self.action.n))} = {count:,} joint choices, and networks here "
                f"give each an output of its own, for {MOST_CHOICES:,} at most: wrap the environment so that it "
                "offers fewer choices, or takes numbers (a Box) that it rounds."
            )
        return count

    def to_unit(self, action: Tensor) -> Tensor:
        """Raw actions [..., A] to unit space [..., U]: bounds to [-1, 1], joint choices to one-hot."""
        if isinstance(self.action, Discrete):
            joint = torch.zeros(action.shape[:-1], dtype=torch.int64, device=action.device)
            for i, (n, start) in enumerate(zip(self.action.n, self.action.start, strict=True)):
                joint = joint * n + (action[..., i].round().long() - start)
            return torch.nn.functional.one_hot(joint, self.unit_width).to(torch.get_default_dtype())
        low, width = _bounds(self.action, action.dtype, action.device)
        return (action - low) / width * 2 - 1

    def to_raw(self, action: Tensor) -> Tensor:
        """Actions [..., U] of unit space to raw ones [..., A], clipped; of choices the one with the largest entry."""
        if isinstance(self.action, Discrete):
            joint, parts = action.argmax(-1), []
            for n, start in zip(reversed(self.action.n), reversed(self.action.start), strict=True):
                parts.append(joint % n + start)
                joint = joint // n
            return torch.stack(parts[::-1], -1).to(action.dtype)
        low, width = _bounds(self.action, action.dtype, action.device)
        return (action.clamp(-1, 1) + 1) / 2 * width + low

    def to_json(self) -> dict[str, Any]:
        return {"obs": [list(part) for part in self.obs], "action": asdict(self.action), "dt": self.dt}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        obs = tuple(Field(str(name), int(width)) for name, width in data["obs"])
        kind = Discrete if "n" in data["action"] else Box
        return cls(obs, kind(**{name: tuple(values) for name, values in data["action"].items()}), data["dt"])


@cache
def _bounds(box: Box, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The lower bounds, and how far the upper ones are from them."""
    low, high = (torch.tensor(bound, dtype=dtype, device=device) for bound in (box.low, box.high))
    return low, high - low


class Episode(NamedTuple):
    """One episode of T steps in raw units. `terminal`: a true end; False: cut by a time limit, bootstrap goes on."""

    obs: np.ndarray  # [T+1, O]
    action: np.ndarray  # [T, A]
    reward: np.ndarray  # [T]
    terminal: bool
    log_prob: np.ndarray | None = None  # [T], of the policy that acted, in [-1, 1] action space


class Transition(NamedTuple):
    """One step of each window: what actor-critics use."""

    obs: Tensor  # [B, O]
    action: Tensor  # [B, k, A]
    reward: Tensor  # [B]
    next_obs: Tensor  # [B, O]
    terminal: Tensor  # [B] bool


class Batch(NamedTuple):
    """B windows of H blocks of k steps, in raw units. Row j is time t + j*k of its episode."""

    obs: Tensor  # [B, H+1, O]   the next state is always there
    action: Tensor  # [B, H, k, A]
    reward: Tensor  # [B, H]        discounted sum over the block: bootstrap with discount**k
    terminal: Tensor  # [B, H] bool   the block ends in a true end
    valid: Tensor  # [B, H] bool   False where the block is cut off by the end of its episode without a true end
    returns: Tensor  # [B, H]        discounted return-to-go
    log_prob: Tensor | None  # [B, H, k]
    key: Tensor  # [B] int64     the sample's random key: its noise is seeding.normal(key, ...)
    span: Tensor | None = None  # [B]  steps from the first row to the last, where rows are those of resampled segments

    @property
    def transition(self) -> Transition:
        return Transition(self.obs[:, 0], self.action[:, 0], self.reward[:, 0], self.obs[:, 1], self.terminal[:, 0])

    def to(self, device: torch.device | str) -> Batch:
        moved = (None if x is None else x.to(device, non_blocking=True) for x in self)
        return Batch(*moved)  # type: ignore[arg-type]

    def split(self, parts: int) -> list[Batch]:
        """The same samples as that many smaller batches, of sizes that differ by one at most."""
        columns = [[None] * parts if x is None else x.tensor_split(parts) for x in self]
        return [Batch(*part) for part in zip(*columns, strict=True)]


class Loss(NamedTuple):
    """A loss as sums, which processes and micro-batches add up: what is minimised is the sum of `terms` over `entries`.

    Each sum runs over this batch's samples alone, so any cut of a global batch gives the same loss. What needs a
    statistic of the whole batch (a mean advantage, say) takes it from `Step.sum` in `update`.
    """

    terms: Mapping[str, Tensor]  # scalars, by the name under which they are reported
    entries: Tensor | int  # how many (of valid rows) that the sums run over
    metrics: Mapping[str, Tensor] = MappingProxyType({})  # scalars, sums as well, which are only reported


class Known(NamedTuple):
    """Hard conditions on rows in a model's space: where `mask` is True the row equals `value`. Not evidence."""

    value: Tensor  # [N, R, D]
    mask: Tensor  # [N, R, D] bool

    def impose(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.value, x)


class Denoiser(Protocol):
    """D(x_k, k) -> x_0 in the codec's space; what the network below it predicts is its own affair.

    `condition` [N, C] is what a model was trained to be told (say, a return). A row holding a NaN is not conditioned,
    and None conditions no row.
    """

    def __call__(
        self, x: Tensor, k: Tensor, condition: Tensor | None = None
    ) -> Tensor: ...  # [N, R, D], [N] int64, [N, C] -> [N, R, D]


class Plan(NamedTuple):
    """For each of N states n weighted plans in raw units, one row every `stride` steps, from that state on."""

    obs: Tensor  # [N, n, R, O'] the fields that the codec selects
    action: Tensor | None  # [N, n, R, k, A]; R-1 of them where they lie between the rows (inverse dynamics)
    stride: int
    log_weight: Tensor  # [N, n] nats; their exponentials add up to one
    log_evidence: Tensor | None = None  # [N] nats: log E[exp(evidence)] given the known states, where there is evidence
    temperature: float | None = None  # that rewards were divided by
    steps: Tensor | None = None  # [N, n] time steps that each takes, where plans last as long as they take
    nats: Mapping[str, Tensor] | None = None  # [N, n] evidence by its parts, where plans were compared
    feasible: Tensor | None = None  # [N, n] bool: whether it keeps all constraints and stays where the data has been

    @classmethod
    def one_each(cls, obs: Tensor, action: Tensor | None, stride: int) -> Plan:
        """A single plan for each state: obs [N, R, O'], action [N, R, k, A]."""
        return cls(obs[:, None], None if action is None else action[:, None], stride, obs.new_zeros(len(obs), 1))

    def cpu(self) -> Plan:
        nats = None if self.nats is None else {name: part.cpu() for name, part in self.nats.items()}
        moved: dict[str, Any] = {name: v.cpu() for name, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._replace(**moved, nats=nats)

    @property
    def weight(self) -> Tensor:
        """The weights [N, n] among each state's feasible plans, or among all where none is: they add up to one."""
        if self.feasible is None:
            return self.log_weight.softmax(1)
        barred = ~self.feasible & self.feasible.any(1, keepdim=True)
        return self.log_weight.masked_fill(barred, -torch.inf).softmax(1)

    @property
    def chosen(self) -> Tensor:
        """Of each state the number [N] of the plan that weighs most, among the feasible ones if there are any."""
        return self.weight.argmax(1)

    @property
    def best(self) -> Plan:
        """Of each state the chosen plan: n is 1."""
        states, chosen = torch.arange(len(self.obs)), self.chosen
        action = None if self.action is None else self.action[states, chosen][:, None]
        steps = None if self.steps is None else self.steps[states, chosen][:, None]
        weight = self.log_weight.new_zeros(len(states), 1)
        return Plan(self.obs[states, chosen][:, None], action, self.stride, weight, steps=steps)

    @property
    def reasons(self) -> tuple[list[str], Tensor]:
        """The parts of the evidence, and of each plan [N, n] the number of the one that speaks most against it.

        Compared with the chosen plan, which has -1; so have all where there is nothing to compare them by. The last
        name, "infeasible", is of plans with more evidence than the chosen one.
        """
        if self.nats is None:
            return [], torch.full(self.log_weight.shape, -1)
        nats = torch.stack(list(self.nats.values()))  # [parts, N, n]
        chosen = self.chosen[:, None]
        own = nats.gather(2, chosen.expand(len(nats), -1, 1))
        reason = (nats - own).argmin(0)
        reason[self.log_weight > self.log_weight.gather(1, chosen)] = len(nats)
        return [*self.nats, "infeasible"], reason.scatter(1, chosen, -1)


class Policy(Protocol):
    """What the evaluator and the collector run on N vectorised environments."""

    def reset(self, done: np.ndarray | None = None) -> None:
        """Forget what was cached for the environments [N] bool that begin a new episode; None: for all."""
        ...

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Raw actions [N, A] for observations [N, O], and their log-probabilities [N] in [-1, 1] space if known."""
        ...


@runtime_checkable
class Explains(Protocol):
    """A policy that can say how it acted."""

    def account(self) -> dict[str, Any]:
        """What JSON can hold, by name."""
        ...


@dataclass(frozen=True)
class Needs:
    """What an algorithm asks of the loop: windows of `horizon` blocks of `stride` steps, and how it is trained.

    With `segments` they are pieces of episodes of any length, resampled to `horizon` rows (`data.segments`).

    `groups` names the parameter groups by phase: each value holds prefixes of parameter names, and "" is all of them.
    `padding` says whether a window may run past the end of its episode. `source` is where batches come from: a fixed
    dataset, a replay that the algorithm's exploration fills, or whole rollouts of its latest weights. `one_process` is
    for what cannot be shared between processes: the loop then refuses more than one. `weigh` gives weights [E] of whole
    episodes for their undiscounted returns [E], and windows of a dataset are drawn accordingly; None: all alike.
    """

    horizon: int = 1
    stride: int = 1
    discount: float = 0.99
    padding: bool = True
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"all": ("",)})
    source: Literal["offline", "replay", "rollout"] = "offline"
    one_process: bool = False
    weigh: Callable[[np.ndarray], np.ndarray] | None = None
    segments: bool = False


class Step(Protocol):
    """One optimiser step on the parameters of a phase: backward, reduction, clipping and precision are its business.

    It gives the means over all processes of the loss's terms and metrics, by name, and the norm of the gradient.
    """

    def __call__(self, batch: Batch, phase: str = "all") -> dict[str, float]: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes: for duals, line searches and statistics of a batch; a mean is the ratio of two."""
        ...


class Chunk(NamedTuple):
    """Steps of the data, in raw units."""

    obs: np.ndarray  # [m, O]
    action: np.ndarray  # [m, A]
    returns: np.ndarray  # [m] discounted return-to-go


Chunks = Callable[..., Iterable[Chunk]]
"""`chunks(discount=1.0)`: all steps of the data, a bounded part at a time."""


class Algorithm(nn.Module, ABC):
    """What the shared loop trains: one module, whose file holds its config, losses, update and policy."""

    Config: ClassVar[type]

    def __init__(self, spec: Spec, config: Any) -> None:
        super().__init__()
        self.spec, self.config = spec, config

    @property
    @abstractmethod
    def needs(self) -> Needs: ...

    @abstractmethod
    def fit(self, chunks: Chunks) -> None:
        """Set what comes from data before training (normalisers), in one pass over `chunks()` for each.

        Not called when there are no data yet.
        """

    @abstractmethod
    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """The loss of a phase, as sums: a function of parameters and batch; its noise comes from `batch.key`."""

    def by_hand(self, batch: Batch, phase: str, unit: int) -> Loss | None:
        """What `forward` gives; sets the gradients that the phase's parameters hold to those of its terms / unit.

        Without autograd, for small networks on a CPU, where the entries are the samples; None: there is no such form.
        Tests hold it to `forward`.
        """
        return None

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        """One iteration. Override for phases in order, targets, duals, epochs or a line search."""
        return step(batch)

    def finish(self, draw: Callable[[int], Batch]) -> None:
        """Estimate what goes with the weights that act, from `draw(n)`, n windows of the data: they are in place now.

        It is called before an export that ends a training, and before an evaluation; not in every process, and not in a
        training without a dataset.
        """

    @abstractmethod
    def policy(self, seed: int = 0, **options: Any) -> Policy: ...

    def save_pretrained(self, folder: Path | str) -> None:
        """Write what it takes to act into a new folder: weights, config, spec and their checksums.

        Raises:
            UserError: the folder exists, or the disk refuses.
        """
        name = type(self).__module__.rpartition(".")[-1]
        data = {"algorithm": name, "config": config.to_dict(self.config), "spec": self.spec.to_json()}
        export.write_whole(Path(folder), data, self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Self:
        """The algorithm of an export, ready to act: `save_pretrained`'s folder, a checkpoint, or a run.

        Raises:
            UserError: there is none, it is damaged or of another algorithm, or a tensor is missing, unknown or of
                another shape.
        """
        folder = export.find(folder)
        data, tensors = export.read(folder)
        own = cls.__module__.rpartition(".")[-1]
        if data["algorithm"] != own:
            raise UserError(f"{folder} holds a {data['algorithm']!r}, not a {own!r}: name another run.")
        algorithm = cls(Spec.from_json(data["spec"]), config.build(cls.Config, data["config"], str(folder)))
        export.assign(algorithm, tensors, str(folder))
        return algorithm.eval()


class Explorer(Algorithm):
    """An algorithm that can gather its own data: what any `needs.source` but offline asks for."""

    @abstractmethod
    def explore(self, obs: np.ndarray, key: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Raw actions [N, A] to gather data with at observations [N, O], and their log-probabilities [N] if known.

        A function of parameters, observations and random keys [N], row by row.
        """


class SourceState(NamedTuple):
    """What a source needs to go on: JSON values and tensors, by name."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


class Source(Protocol):
    """Where batches come from. The batch of step k is a function of (seed, k) and of what the state says.

    With several processes each has a source of its own that gives its slice of the global batch.

    Attributes:
        seconds: spent in environments so far.
        asked: whether this process is asked to stop; who gathers for long raises `interrupts.Asked` then.
    """

    seconds: float
    asked: Callable[[], bool]

    def __call__(self, step: int) -> Batch: ...

    def state(self) -> SourceState:
        """What a checkpoint keeps. Names are global: what two processes both keep under one name is the same."""
        ...

    def load(self, state: SourceState) -> None:
        """Take up a state, joined from those of all processes.

        Raises:
            UserError: it is not of these data.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to report of it."""
        ...

    def prune(self, kept: Iterable[Mapping[str, Any]]) -> None:
        """Remove what only checkpoints needed that are gone; `kept` are the facts of those that are there."""
        ...

    def close(self) -> None: ...
