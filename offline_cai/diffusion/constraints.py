"""Constraints on each row of a trajectory: as evidence they are barriers, and they can project onto what they allow.

All of them look at some columns of a row, in the rows' units; `InUnits` puts them into raw units.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.data.codec import Codec
from offline_cai.diffusion.evidence import Evidence, require_finite
from offline_cai.errors import UserError

ROUNDS = 1000  # of projections in turn, before constraints count as contradictory
STARTS = 16  # points that they begin from
CENTRE = 1e-6  # of a circle's radius: nearer to its centre no direction leads out
SLACK = 1e-3  # of a constraint's width: a violation that counts as none


class Constraint(Evidence, Protocol):
    """Evidence that says by how much each row is outside, and where the nearest row inside is."""

    @property
    def columns(self) -> tuple[int, ...]: ...
    @property
    def width(self) -> float: ...

    def violation(self, x: Tensor) -> Tensor: ...  # [N, R, D] -> [N, R], a distance, positive outside
    def project(self, x: Tensor) -> Tensor: ...  # [N, R, D] -> [N, R, D]


@dataclass(frozen=True, kw_only=True)
class _Barrier:
    """log sigmoid(-violation / width) summed over rows: the log-probability that a doubtful observer finds it kept."""

    columns: tuple[int, ...]
    width: float
    """How soft the border is as evidence, in the rows' units: a row on it pays log 2, one 4 widths inside 1/50 nat."""
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.width < math.inf:
            raise UserError(f"the constraint's width is {self.width}; take a positive distance, its softness.")

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return logsigmoid(-self.violation(x) / self.width).sum(-1)

    def violation(self, x: Tensor) -> Tensor:
        return self._outside(x[..., list(self.columns)])

    def project(self, x: Tensor) -> Tensor:
        moved = x.clone()
        moved[..., list(self.columns)] = self._nearest(x[..., list(self.columns)])
        return moved

    @abstractmethod
    def _outside(self, x: Tensor) -> Tensor: ...  # [N, R, c] -> [N, R]

    @abstractmethod
    def _nearest(self, x: Tensor) -> Tensor: ...  # [N, R, c] -> [N, R, c]


@dataclass(frozen=True, kw_only=True)
class HalfSpace(_Barrier):
    """normal · x <= offset in every row."""

    normal: tuple[float, ...]
    offset: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_each("normal", self.normal, self.columns)
        require_finite("the half-space's normal and offset", *self.normal, self.offset)
        if not any(self.normal):
            raise UserError("the half-space's normal is zero: give the direction that it bounds.")

    def sides(self) -> list[tuple[tuple[float, ...], float]]:
        """The half-spaces, normal · x[columns] <= offset, that it is made of."""
        return [(self.normal, self.offset)]

    def _outside(self, x: Tensor) -> Tensor:
        normal = x.new_tensor(self.normal)
        return (x @ normal - self.offset) / normal.norm()

    def _nearest(self, x: Tensor) -> Tensor:
        normal = x.new_tensor(self.normal)
        return x - self._outside(x).clamp(min=0)[..., None] * normal / normal.norm()


@dataclass(frozen=True, kw_only=True)
class Inside(_Barrier):
    """low <= x <= high in every row."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_each("low", self.low, self.columns)
        _one_each("high", self.high, self.columns)
        for column, low, high in zip(self.columns, self.low, self.high, strict=True):
            if not low <= high or low == math.inf or high == -math.inf:
                raise UserError(
                    f"the box allows column {column} from {low} to {high}, which is nothing: give the lower number "
                    "first (an infinite one leaves a side open)."
                )

    def sides(self) -> list[tuple[tuple[float, ...], float]]:
        """The half-spaces, normal · x[columns] <= offset, that it is made of."""
        unit = [tuple(float(i == j) for j in range(len(self.columns))) for i in range(len(self.columns))]
        upper = [(normal, high) for normal, high in zip(unit, self.high, strict=True) if high < math.inf]
        lower = zip(unit, self.low, strict=True)
        return upper + [(tuple(-n for n in normal), -low) for normal, low in lower if low > -math.inf]

    def _outside(self, x: Tensor) -> Tensor:
        return torch.maximum(x.new_tensor(self.low) - x, x - x.new_tensor(self.high)).amax(-1)

    def _nearest(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x, x.new_tensor(self.low)), x.new_tensor(self.high))


@dataclass(frozen=True, kw_only=True)
class Outside(_Barrier):
    """|x - centre| >= radius in every row: a circle (or ball) to avoid."""

    centre: tuple[float, ...]
    radius: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_each("centre", self.centre, self.columns)
        require_finite("the circle's centre", *self.centre)
        if not 0 < self.radius < math.inf:
            raise UserError(f"the circle's radius is {self.radius}; take a positive distance.")

    def _outside(self, x: Tensor) -> Tensor:
        square = (x - x.new_tensor(self.centre)).square().sum(-1)
        return self.radius - square.clamp(min=(CENTRE * self.radius) ** 2).sqrt()

    def _nearest(self, x: Tensor) -> Tensor:
        away = x - x.new_tensor(self.centre)
        distance = away.norm(dim=-1, keepdim=True)
        first = torch.zeros_like(away)
        first[..., 0] = 1.0  # from the very centre every way out is as short
        out = torch.where(distance > 0, away / distance.clamp(min=torch.finfo(x.dtype).tiny), first)
        return torch.where(distance < self.radius, x.new_tensor(self.centre) + self.radius * out, x)


@dataclass(frozen=True)
class ConstraintInUnits:
    """A constraint on the selected observation in raw units, for a model's normalised rows."""

    codec: Codec
    constraint: Constraint
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[int, ...]:
        return self.constraint.columns

    @property
    def width(self) -> float:
        return self.constraint.width

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return self.constraint(self.codec.decode(x)[0], k, temperature)

    def violation(self, x: Tensor) -> Tensor:
        return self.constraint.violation(self.codec.decode(x)[0])

    def project(self, x: Tensor) -> Tensor:
        obs = self.codec.obs_norm.encode(self.constraint.project(self.codec.decode(x)[0]))
        return torch.cat([x[..., : self.codec.actions], obs, x[..., self.codec.state.stop :]], -1)


def allowed(constraints: Sequence[Constraint], columns: Sequence[int], places: Tensor, widths: float = 0.0) -> Tensor:
    """Whether places [..., c], `columns` of a row, keep the constraints that look at no other columns: [...].

    They do if they are so many of a constraint's widths inside.
    """
    rows = places.new_zeros(*places.shape[:-1], max(columns) + 1)
    rows[..., list(columns)] = places
    keeps = torch.ones(places.shape[:-1], dtype=torch.bool, device=places.device)
    for constraint in constraints:
        if set(constraint.columns) <= set(columns):
            keeps &= constraint.violation(rows) <= -widths * constraint.width
    return keeps


def project(constraints: Sequence[Constraint], known: Known, x: Tensor) -> Tensor:
    """x [N, R, D] moved until all constraints hold, within SLACK, with what is known in its place.

    Onto one constraint after the other, round and round: the nearest point for a single one, a near one for several.

    Raises:
        UserError: ROUNDS of it do not get there.
    """
    x = known.impose(x)
    for _ in range(ROUNDS):
        for constraint in constraints:
            x = known.impose(constraint.project(x))
        if all(bool((c.violation(x) <= SLACK * c.width).all()) for c in constraints):
            return x
    raise UserError(
        f"projecting onto {len(constraints)} constraints in turn does not meet all of them in {ROUNDS} rounds: loosen "
        "one, or let them count as barriers (planner.evidence.project: false)."
    )


def check_feasible(constraints: Sequence[Constraint], known: Known) -> None:
    """Whether each row can satisfy all constraints and what is known of it.

    Projecting onto one after the other finds a point nearly always. Where it does not, a linear program decides for
    half-spaces and boxes; with circles, no point was found.

    Raises:
        UserError: it names the plan, the row and a constraint that stays violated.
    """
    value, mask = known
    shape = tuple(value.shape[1:])
    starts = seeding.normal(seeding.keys(0, 0, torch.arange(STARTS)), (len(value), *shape), dtype=value.dtype)
    everywhere = Known(value.repeat(STARTS, 1, 1), mask.repeat(STARTS, 1, 1))
    x = everywhere.impose(everywhere.value + starts.to(value.device).flatten(0, 1))

    def missed() -> Tensor:
        """Of the best start, in widths: [constraints, N, R]."""
        parts = torch.stack([c.violation(x) / c.width for c in constraints]).unflatten(1, (STARTS, len(value)))
        best = parts.amax(0).argmin(0)  # [N, R]
        return parts.gather(1, best.expand(len(parts), 1, *best.shape))[:, 0]

    for _ in range(ROUNDS):
        if not constraints or bool((missed() <= SLACK).all()):
            return
        for constraint in constraints:
            x = everywhere.impose(constraint.project(x))
    asked: dict[tuple[object, ...], bool] = {}
    for plan, row in (missed() > SLACK).any(0).nonzero().tolist():
        numbers, given = value[plan, row], mask[plan, row]
        same = (*given.tolist(), *(numbers * given).tolist())
        if same not in asked:
            asked[same] = _has_point(constraints, numbers, given)
        if not asked[same]:
            number = int(missed()[:, plan, row].argmax())
            violated = _raw(constraints[number])
            best = float(missed()[number, plan, row]) * violated.width
            raise UserError(
                f"no point was found for row {row} of plan {plan} that satisfies {type(violated).__name__} together "
                f"with the other constraints and what is known of it; the best one violates it by {best:.3g}. Loosen "
                "one of them, or free the known number."
            )


def _has_point(constraints: Sequence[Constraint], value: Tensor, mask: Tensor) -> bool:
    """Whether a row, known in part [D], has a point that all constraints allow; False as well if some are circles."""
    from scipy.optimize import linprog

    above: list[list[float]] = []
    below: list[float] = []
    bounds: list[tuple[float | None, float | None]] = [(None, None)] * len(value)
    for constraint in constraints:
        raw = _raw(constraint)
        if not isinstance(raw, HalfSpace | Inside):
            return False
        numbers, given = value, mask
        if isinstance(constraint, ConstraintInUnits):
            numbers = constraint.codec.obs_norm.decode(value[constraint.codec.actions :])
            given = mask[constraint.codec.actions :]
        for column in given.nonzero()[:, 0].tolist():
            bounds[column] = (float(numbers[column]),) * 2
        for normal, offset in raw.sides():
            side = [0.0] * len(value)
            for column, part in zip(raw.columns, normal, strict=True):
                side[column] += part
            above.append(side)
            below.append(offset + SLACK * raw.width * math.hypot(*normal))
    return bool(linprog([0.0] * len(value), above, below, bounds=bounds).status == 0)


def _raw(constraint: Constraint) -> Constraint:
    return constraint.constraint if isinstance(constraint, ConstraintInUnits) else constraint


def _one_each(name: str, numbers: tuple[float, ...], columns: tuple[int, ...]) -> None:
    if len(numbers) != len(columns):
        raise UserError(f"{name} has {len(numbers)} numbers for {len(columns)} columns; give one for each.")
