"""Constraints: distances, nearest points, barriers, and what cannot be satisfied."""

import math

import pytest
import torch
from torch import Tensor

from offline_cai.core import Box, Field, Known, Spec
from offline_cai.data.codec import Codec
from offline_cai.diffusion.constraints import (
    Constraint,
    ConstraintInUnits,
    HalfSpace,
    Inside,
    Outside,
    check_feasible,
)
from offline_cai.errors import UserError

F64 = torch.float64
SOFT = {"columns": (0, 2), "width": 0.1}
ALL = [
    HalfSpace(normal=(3.0, 4.0), offset=1.0, **SOFT),  # type: ignore[arg-type]
    Inside(low=(-0.5, -0.2), high=(0.4, 0.1), **SOFT),  # type: ignore[arg-type]
    Outside(centre=(0.1, 0.0), radius=0.8, **SOFT),  # type: ignore[arg-type]
]
X = torch.randn(50, 4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))


def known(value: Tensor | None = None, rows: tuple[int, ...] = ()) -> Known:
    mask = torch.zeros(1, 4, 3, dtype=torch.bool)
    mask[:, list(rows)] = True
    return Known(torch.zeros(1, 4, 3, dtype=F64) if value is None else value, mask)


@pytest.mark.parametrize("constraint", ALL, ids=lambda c: type(c).__name__)
def test_projection_is_to_the_nearest_point_that_is_allowed(constraint: Constraint) -> None:
    moved, outside = constraint.project(X), constraint.violation(X) > 0
    assert constraint.violation(moved).max() <= 1e-12
    assert torch.equal(moved[~outside], X[~outside]) and torch.equal(moved[..., 1], X[..., 1])
    assert 0.1 < outside.double().mean() < 0.99
    grid = torch.cartesian_prod(*[torch.linspace(-3, 3, 601, dtype=F64)] * 2)
    rows = torch.zeros(len(grid), 1, 3, dtype=F64)
    rows[:, 0, [0, 2]] = grid
    allowed = grid[constraint.violation(rows)[:, 0] <= 0]
    for x, to in zip(X[outside][:20, [0, 2]], moved[outside][:20, [0, 2]], strict=True):
        best = float((allowed - x).norm(dim=1).min())
        assert float((to - x).norm()) == pytest.approx(best, abs=0.015)


@pytest.mark.parametrize("constraint", ALL, ids=lambda c: type(c).__name__)
def test_a_barrier_is_the_log_of_a_probability(constraint: Constraint) -> None:
    nats = constraint(X, torch.zeros(50, dtype=torch.int64), 123.0)
    expected = torch.sigmoid(-constraint.violation(X) / 0.1).log().sum(1)
    torch.testing.assert_close(nats, expected, rtol=1e-6, atol=1e-9)
    border = constraint.project(X + 3)[:1]
    edge = constraint(border, torch.zeros(1, dtype=torch.int64), 1.0)
    if not isinstance(constraint, Outside):
        assert float(edge) == pytest.approx(-4 * math.log(2), rel=1e-6)


def test_violations_are_distances() -> None:
    x = torch.zeros(1, 1, 3, dtype=F64)
    x[..., 0] = 2.0
    assert [round(float(c.violation(x)), 9) for c in ALL] == [1.0, 1.6, -1.1]
    centre = torch.tensor([[[0.1, 0.0, 0.0]]], dtype=F64)
    assert float(ALL[2].violation(ALL[2].project(centre))) <= 1e-12


def test_raw_units_are_the_codec_s(spec: Spec) -> None:
    codec = Codec(spec, 4, fields=("observation",), actions=True)
    codec.obs_norm.shift.copy_(torch.tensor([1.0, 2.0, 0.0, 0.0]))
    codec.obs_norm.scale.copy_(torch.tensor([2.0, 4.0, 1.0, 1.0]))
    box = ConstraintInUnits(codec, Inside(columns=(0,), low=(0.0,), high=(2.0,), width=0.1))
    x = torch.full((1, 4, codec.width), 0.9)
    torch.testing.assert_close(box.violation(x), torch.full((1, 4), 0.8))
    moved = box.project(x)
    torch.testing.assert_close(moved[..., codec.actions], torch.full((1, 4), 0.5))
    assert torch.equal(moved[..., : codec.actions], x[..., : codec.actions]) and box.width == 0.1
    with pytest.raises(UserError, match="that satisfies Inside together"):
        check_feasible([box], Known(x, torch.ones_like(x, dtype=torch.bool)))
    torch.testing.assert_close(box(x, torch.zeros(1), 1.0), torch.nn.functional.logsigmoid(torch.tensor([-8.0])) * 4)


def test_what_can_be_satisfied_passes() -> None:
    check_feasible([*ALL[:2], Outside(centre=(0.1, 0.0), radius=0.5, **SOFT)], known())  # type: ignore[arg-type]
    check_feasible([], known())
    check_feasible(ALL[:2], known(torch.full((1, 4, 3), -0.1, dtype=F64), (0, 3)))
    corner = [Inside(low=(0.0, 0.0), high=(1.0, 1.0), **SOFT), HalfSpace(normal=(-1.0, -1.0), offset=-1.999, **SOFT)]  # type: ignore[arg-type]
    check_feasible(corner, known())


def test_a_narrow_wedge_is_found_where_projections_in_turn_are_too_slow() -> None:
    """y <= 0 and y >= .01 x + .05 meet left of x = -5: by a linear program, also in a codec's units."""
    flat = {"columns": (0, 1), "width": 0.01}
    wedge = [HalfSpace(normal=(0.0, 1.0), offset=0.0, **flat), HalfSpace(normal=(0.01, -1.0), offset=-0.05, **flat)]  # type: ignore[arg-type]
    check_feasible(wedge, known())
    codec = Codec(Spec((Field("observation", 3),), Box((-1.0,), (1.0,))), 4, actions=True)
    codec.obs_norm.scale.fill_(2.0)
    raw = [ConstraintInUnits(codec, constraint) for constraint in wedge]
    value, mask = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 2, 1] = True
    value[:, 2, 1] = -2.6  # -5.2 in raw units
    check_feasible(raw, Known(value, mask))
    value[:, 2, 1] = -2.4
    with pytest.raises(UserError, match="no point was found for row 2 of plan 0"):
        check_feasible(raw, Known(value, mask))


def test_what_cannot_be_satisfied_is_named() -> None:
    apart = [HalfSpace(normal=(1.0, 0.0), offset=-1.0, **SOFT), HalfSpace(normal=(-1.0, 0.0), offset=-1.0, **SOFT)]  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"no point was found for row 0 of plan 0 that satisfies HalfSpace .* violates it by"
    ):
        check_feasible(apart, known())
    with pytest.raises(UserError, match=r"row 2 of plan 0 that satisfies Outside .*violates it by 0\.7"):
        check_feasible([ALL[2]], known(rows=(2,)))
    swallowed = [Inside(low=(0.0, -0.1), high=(0.2, 0.1), **SOFT), ALL[2]]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no point was found"):
        check_feasible(swallowed, known())


def test_mistakes_are_sentences() -> None:
    soft = {"columns": (0,), "width": 0.1}
    cases = {
        "width is 0": lambda: Inside(columns=(0,), width=0.0, low=(0.0,), high=(1.0,)),
        "from 1.0 to 0.0, which is nothing": lambda: Inside(low=(1.0,), high=(0.0,), **soft),  # type: ignore[arg-type]
        "low has 2 numbers for 1 columns": lambda: Inside(low=(1.0, 2.0), high=(0.0,), **soft),  # type: ignore[arg-type]
        "normal is zero": lambda: HalfSpace(normal=(0.0,), offset=1.0, **soft),  # type: ignore[arg-type]
        "column 0 from nan to 1.0, which is nothing": lambda: Inside(low=(math.nan,), high=(1.0,), **soft),  # type: ignore[arg-type]
        "from inf to inf, which is nothing": lambda: Inside(low=(math.inf,), high=(math.inf,), **soft),  # type: ignore[arg-type]
        "normal and offset is 1.0, nan; give finite": lambda: HalfSpace(normal=(1.0,), offset=math.nan, **soft),  # type: ignore[arg-type]
        "centre is inf; give finite": lambda: Outside(centre=(math.inf,), radius=1.0, **soft),  # type: ignore[arg-type]
        "radius is inf": lambda: Outside(centre=(0.0,), radius=math.inf, **soft),  # type: ignore[arg-type]
        "width is nan": lambda: Inside(columns=(0,), width=math.nan, low=(0.0,), high=(1.0,)),
        "radius is -1": lambda: Outside(centre=(0.0,), radius=-1.0, **soft),  # type: ignore[arg-type]
    }
    for sentence, mistake in cases.items():
        with pytest.raises(UserError, match=sentence):
            mistake()
    assert Inside(low=(-math.inf,), high=(1.0,), **soft).violation(torch.tensor([[[3.0]]])).item() == 2  # type: ignore[arg-type]
