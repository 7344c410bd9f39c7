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

ALONE: Any = SimpleNamespace(sum=lambda x: x)  # the step of a single process


def test_the_kl_is_that_of_the_weights() -> None:
    advantage = torch.tensor([0.0, 1.0, 3.0, -2.0])
    weight = (advantage.double() / 0.7).softmax(0)
    expected = float((weight * (4 * weight).log()).sum())
    assert Projection(0.7, None, clip=None).measure(advantage, ALONE)["kl"] == pytest.approx(expected)


def test_the_kl_of_enormous_advantages_is_finite() -> None:
    """Where all but one of many samples are as large as can be, the KL is nearly none."""
    advantage = torch.full((100_000,), 1e30)
    advantage[0] = 0.0
    found = Projection(1.0, None, clip=20.0).measure(advantage, ALONE)["kl"]
    assert found == pytest.approx(math.log(1e5 / 99_999), abs=1e-9 * LARGEST)


@pytest.mark.parametrize("config", [AWRConfig, IQLConfig])
@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan])
def test_a_largest_weight_that_cannot_be_is_said(config: Any, clip: float) -> None:
    with pytest.raises(UserError, match=rf"clip is {clip}; .*positive, or null for none"):
        config(clip=clip)
