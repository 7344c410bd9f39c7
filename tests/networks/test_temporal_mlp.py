import torch

from offline_cai.networks.temporal_mlp import TemporalMLP


def test_shapes_and_dependence() -> None:
    torch.manual_seed(0)
    net = TemporalMLP(3, 8, hidden=16, blocks=2, condition=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, k = torch.randn(2, 8, 3), torch.tensor([1, 5])
    assert net(x, k).shape == x.shape
    assert not torch.allclose(net(x, k), net(x, k + 1)), "the level matters"
    moved = x.clone()
    moved[:, -1] += 1
    assert (net(moved, k)[:, 0] - net(x, k)[:, 0]).abs().max() > 0, "the last row reaches the first"
    told = torch.tensor([[0.5], [torch.nan]])
    assert not torch.allclose(net(x, k, told)[0], net(x, k)[0]) and torch.allclose(net(x, k, told)[1], net(x, k)[1])


def test_it_begins_at_zero() -> None:
    """Its first prediction is the mean of what is normalised."""
    assert (TemporalMLP(3, 8, hidden=16)(torch.randn(2, 8, 3), torch.tensor([0, 9])) == 0).all()


def test_one_level_for_all_rows_is_as_if_each_had_its_own() -> None:
    torch.manual_seed(0)
    net = TemporalMLP(3, 8, hidden=16, blocks=2, condition=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, k, told = torch.randn(4, 8, 3), torch.tensor(5), torch.rand(4, 1)
    for condition in (None, told):
        assert torch.allclose(net(x, k.expand(4), condition), net(x, k.repeat(4), condition))
