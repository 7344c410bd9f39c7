"""The statistics that a projection takes of a batch."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offline_cai.algorithms.awr import AWRConfig
from offline_cai.algorithms.iql import IQLConfig
from offline_cai.errors import UserError
from offline_cai.policies.projection import LARGEST, Projection


def kl(projection: Projection, advantage: torch.Tensor) -> float:
    """As a step reports it: tallied sums, divided by the number of samples."""
    sums = projection.tally(advantage)
    return projection.settle({name: float(x) / len(advantage) for name, x in sums.items()})["kl"]


def test_the_kl_is_that_of_the_weights() -> None:
    advantage = torch.tensor([0.0, 1.0, 3.0, -2.0])
    weight = (advantage.double() / 0.7).softmax(0)
    expected = float((weight * (4 * weight).log()).sum())
    assert kl(Projection(0.7, None, clip=None), advantage) == pytest.approx(expected)


def test_the_kl_of_enormous_advantages_is_finite() -> None:
    """Where all but one of many samples are as large as can be, the KL is nearly none."""
    advantage = torch.full((100_000,), 1e30)
    advantage[0] = 0.0
    found = kl(Projection(1.0, None, clip=20.0), advantage)
    assert found == pytest.approx(math.log(1e5 / 99_999), abs=1e-9 * LARGEST)


@pytest.mark.parametrize("kl_now, direction", [(3.0, 1), (0.1, -1)])
def test_a_learned_temperature_moves_towards_its_budget(kl_now: float, direction: int) -> None:

    projection = Projection("auto", 0.5, clip=None)
    before = float(projection.dial.temperature)
    after = projection.settle({"weight": 1.0, "tilted": kl_now})["temperature"]
    assert math.copysign(1, after - before) == direction and after != before


def test_a_step_that_was_skipped_leaves_the_temperature() -> None:
    projection = Projection("auto", 0.5, clip=None)
    assert projection.settle({"loss": 1.0}) == {"loss": 1.0, "temperature": float(projection.dial.temperature)}


def test_advantages_are_standardised_over_all_processes() -> None:
    x = torch.tensor([1.0, 4.0, -2.0, 7.0])
    projection, two = Projection(1.0, None, clip=None, normalise=True), SimpleNamespace(sum=lambda part: 2 * part)
    projection.standardise(x, two)  # another process has the same ones
    assert float(projection.shift) == pytest.approx(2.5) and float(projection.scale) == pytest.approx(
        float(x.std(correction=0))
    )


@pytest.mark.parametrize("config", [AWRConfig, IQLConfig])
@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_largest_weight_that_cannot_be_is_said(config: Any, clip: float) -> None:
    with pytest.raises(UserError, match=rf"clip is {clip}; .*positive, or null for none"):
        config(clip=clip)
