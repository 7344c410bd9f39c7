from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from offline_cai.errors import UserError
from offline_cai.networks.temporal_mlp import ValueMLP
from offline_cai.networks.temporal_value import TemporalValue


def test_the_parameter_count_is_the_papers() -> None:
    """Janner et al. 2022, the value network of hopper: 32 rows of 14 numbers."""
    assert sum(p.numel() for p in TemporalValue(14, 32).parameters()) == 2_294_817


@pytest.mark.parametrize(
    "make", [partial(TemporalValue, channels=16, multipliers=(1, 4)), partial(ValueMLP, hidden=16)]
)
def test_shapes_and_dependence(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    net = make(3, 6, condition=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, k = torch.randn(2, 6, 3), torch.tensor([1, 5])
    value = net(x, k, torch.zeros(2, 1))
    assert value.shape == (2,)
    for row in (0, 5):
        moved = x.clone()
        moved[:, row] += 1
        assert not torch.allclose(net(moved, k, torch.zeros(2, 1)), value), "every row matters"
    assert not torch.allclose(net(x, k + 1, torch.zeros(2, 1)), value), "the level matters"
    assert not torch.allclose(net(x, k, torch.ones(2, 1)), value), "the condition matters"
    assert torch.allclose(net(x[:1], k[:1], torch.zeros(1, 1)), value[:1], atol=1e-6), "samples do not mix"


def test_sizes_that_do_not_fit_are_named() -> None:
    for net in (TemporalValue(3, 4), ValueMLP(3, 4)):
        with pytest.raises(UserError, match="of 8 rows was given to a guide that was trained for 4 rows"):
            net(torch.zeros(1, 8, 3), torch.zeros(1))
    with pytest.raises(UserError, match="last level has 16 channels"):
        TemporalValue(3, 4, 8, (1, 2))
