"""The statistics that a projection takes of a batch."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offline_cai.algorithms.awr import AWRConfig
from offline_cai.algorithms.iql import IQLConfig
from offline_cai.errors import UserError
from offline_cai.policies.projection import Projection


def kl(projection: Projection, advantage: torch.Tensor) -> float:
    return projection.settle(reported(projection, advantage))["kl"]


def reported(projection: Projection, advantage: torch.Tensor) -> dict[str, float]:
    """What a step reports of it, by sums in float32 as processes add them up."""
    return {name: float(x.float()) / len(advantage) for name, x in projection.tally(advantage).items()}


def test_the_kl_is_that_of_the_weights() -> None:
    advantage = torch.tensor([0.0, 1.0, 3.0, -2.0])
    weight = (advantage.double() / 0.7).softmax(0)
    expected = float((weight * (4 * weight).log()).sum())
    assert kl(Projection(0.7, None, clip=None), advantage) == pytest.approx(expected)


@pytest.mark.parametrize("most", [1e30, -1e30, -torch.inf])
def test_weights_out_of_reach_count_as_infinitely_far(most: float) -> None:
    """A budget that the ties of bounded weights would seem to meet does not make the temperature colder."""
    advantage = torch.linspace(0.2, 1.0, 100_000) * most
    advantage[:10] = 0.0 if most > 0 else most
    projection = Projection("auto", 1.5, clip=20.0)
    metrics = projection.settle(reported(projection, advantage))
    assert set(metrics) == {"temperature"} and metrics["temperature"] > 1


def test_the_kl_of_large_advantages_is_that_of_their_weights() -> None:
    """As far as float32 holds their sums."""
    advantage = torch.full((100_000,), 50.0)
    advantage[0] = -50.0
    found = kl(Projection(1.0, None, clip=20.0), advantage)
    assert found == pytest.approx(math.log(1e5 / 99_999), abs=50 * 1e5 * 1e-7 / 1e4)


@pytest.mark.parametrize("kl_now, direction", [(3.0, 1), (0.1, -1)])
def test_a_learned_temperature_moves_towards_its_budget(kl_now: float, direction: int) -> None:
    projection = Projection("auto", 0.5, clip=None)
    before = float(projection.dial.temperature)
    after = projection.settle({"weight": 1.0, "tilted": kl_now})["temperature"]
    assert math.copysign(1, after - before) == direction and after != before


def test_a_step_that_was_skipped_leaves_the_temperature() -> None:
    projection = Projection("auto", 0.5, clip=None)
    before = float(projection.dial.temperature)
    assert projection.settle({"loss": 1.0}) == {"loss": 1.0, "temperature": before}


def test_advantages_are_standardised_over_all_processes() -> None:
    here, there = torch.tensor([1.0, 4.0, -2.0, 7.0]), torch.tensor([10.0, 20.0])
    others = torch.tensor([2.0, 30.0, 500.0]).double()  # count, sum and squares of what another process has
    projection = Projection(1.0, None, clip=None, normalise=True)
    projection.standardise(here, SimpleNamespace(sum=lambda part: part + others))  # type: ignore[arg-type]
    both = torch.cat([here, there])
    assert float(projection.shift) == pytest.approx(float(both.mean()))
    assert float(projection.scale) == pytest.approx(float(both.std(correction=0)))


@pytest.mark.parametrize("config", [AWRConfig, IQLConfig])
@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_largest_weight_that_cannot_be_is_said(config: Any, clip: float) -> None:
    with pytest.raises(UserError, match=rf"clip is {clip}; .*positive, or null for none"):
        config(clip=clip)
