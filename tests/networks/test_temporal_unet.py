import pytest
import torch

from offline_cai.errors import UserError
from offline_cai.networks.mlp import mlp
from offline_cai.networks.temporal_unet import TemporalUNet


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("width", "multipliers", "count"),
    [(6, (1, 4, 8), 3_682_118), (14, (1, 2, 4, 8), 3_956_302), (6, (1, 2, 4), 997_574)],
)
def test_parameter_counts_are_the_papers(width: int, multipliers: tuple[int, ...], count: int) -> None:
    """Janner et al. 2022: its maze model, its hopper model, and a smaller one of the same layers."""
    assert parameters(TemporalUNet(width, 32, multipliers)) == count


def test_shapes_and_dependence() -> None:
    torch.manual_seed(0)
    net = TemporalUNet(3, 8, (1, 2))
    x, k = torch.randn(2, 8, 3), torch.tensor([1, 5])
    assert net(x, k).shape == x.shape
    assert not torch.allclose(net(x, k), net(x, k + 1)), "the level matters"
    moved = x.clone()
    moved[:, -1] += 1
    assert (net(moved, k)[:, 0] - net(x, k)[:, 0]).abs().max() > 0, "the last row reaches the first"
    assert torch.allclose(net(x, k)[:1], net(x[:1], k[:1]), atol=1e-6), "samples do not mix"


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(UserError, match=r"7 rows cannot pass 2 levels .* multiple of 2"):
        TemporalUNet(3, 8, (1, 2))(torch.randn(1, 7, 3), torch.tensor([0]))
    with pytest.raises(UserError, match="multiple of 8"):
        TemporalUNet(3, 12)


def test_mlp_layers() -> None:
    net = mlp(3, (5, 7), 2)
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 3), (5,), (7, 5), (7,), (2, 7), (2,)]
    assert net(torch.zeros(4, 3)).shape == (4, 2)
