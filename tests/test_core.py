import numpy as np
import pytest
import torch

from offline_cai.core import Box, Discrete, Field, Known, Plan, Spec
from offline_cai.errors import UserError


def test_columns_follow_the_order_of_names(spec: Spec) -> None:
    assert spec.columns("observation", "achieved_goal") == [4, 5, 6, 7, 0, 1]
    with pytest.raises(UserError, match=r"no field 'observatoin'; did you mean 'observation'"):
        spec.columns("observatoin")


def test_actions_map_to_the_unit_box_and_back(spec: Spec) -> None:
    raw = torch.tensor([[-1.0, -2.0], [1.0, 2.0], [0.5, 1.0]])
    assert torch.allclose(spec.to_unit(raw), torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.5, 0.5]]))
    assert torch.allclose(spec.to_raw(spec.to_unit(raw)), raw)
    assert torch.allclose(spec.to_raw(torch.tensor([[9.0, -9.0]])), torch.tensor([[1.0, -2.0]]))


@pytest.mark.parametrize("high", [np.inf, -1.0, np.nan])
def test_bounds_have_to_be_finite_and_in_order(high: float) -> None:
    with pytest.raises(UserError, match="action component 1"):
        Box((-1.0, -1.0), (1.0, high))


def test_spec_survives_json(spec: Spec) -> None:
    assert Spec.from_json(spec.to_json()) == spec
    choices = Spec((Field("observation", 2),), Discrete((3, 4), (0, 1)))
    assert Spec.from_json(choices.to_json()) == choices


def test_choices_are_one_hot_over_their_joint_number() -> None:
    choices = Spec((Field("observation", 2),), Discrete((3, 4), (0, 1)))
    assert choices.action.high == (2, 4) and choices.action_width == 2 and choices.unit_width == 12
    raw = torch.tensor([[i, j] for i in range(3) for j in range(1, 5)], dtype=torch.float32)
    assert torch.equal(choices.to_unit(raw), torch.eye(12))
    assert torch.equal(choices.to_raw(torch.eye(12)), raw)
    with pytest.raises(UserError, match=r"choices \(3 x 4\), but continuous actions are needed"):
        choices.box.low  # noqa: B018
    many = Spec((Field("observation", 2),), Discrete((10,) * 7, (0,) * 7))
    with pytest.raises(UserError, match=r"10 x 10 x .* = 10,000,000 joint choices.* 100,000 at most: wrap"):
        many.unit_width  # noqa: B018


def test_known_rows_are_imposed() -> None:
    known = Known(torch.ones(1, 2, 2), torch.tensor([[[True, False], [False, False]]]))
    assert known.impose(torch.zeros(1, 2, 2)).tolist() == [[[1.0, 0.0], [0.0, 0.0]]]


def test_the_best_plan_is_the_one_that_weighs_most() -> None:
    obs, action = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4, 1), torch.arange(2 * 3.0).reshape(2, 3, 1, 1, 1)
    weight = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]]).log()
    best = Plan(obs, action, 2, weight, torch.zeros(2)).best
    assert torch.equal(best.obs, obs[[0, 1], [1, 0]][:, None]) and best.stride == 2
    assert best.action is not None and best.action.flatten().tolist() == [1, 3]
    assert torch.equal(best.log_weight, torch.zeros(2, 1))
    alone = Plan.one_each(obs[:, 0], None, 2)
    assert alone.best.obs.shape == (2, 1, 4, 1) and alone.action is None
