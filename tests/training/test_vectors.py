"""Parameters as parts of one vector."""

import torch
from torch import nn

from offline_cai.training.vectors import LINE, Vector


def test_parameters_keep_their_values_and_move_with_the_vector() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, before = torch.randn(7, 3), [p.detach().clone() for p in net.parameters()]
    said = net(x)
    vector = Vector(net.parameters())
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert torch.equal(net(x), said)
    assert all(p.data_ptr() % LINE == vector.values.data_ptr() % LINE for p in net.parameters())
    net(x).square().sum().backward()
    slopes = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(vector.parts(vector.gradient), slopes, strict=True))
    torch.optim.SGD([vector.values], lr=0.5).step()
    for p, q, slope in zip(net.parameters(), before, slopes, strict=True):
        assert torch.allclose(p, q - 0.5 * slope)


def test_parts_are_joined_again() -> None:
    vector = Vector([nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(()))])
    parts = [torch.randn(3, 5), torch.randn(())]
    assert all(torch.equal(a, b) for a, b in zip(vector.parts(vector.joined(parts)), parts, strict=True))
    first, second = vector.parts(vector.joined([None, parts[1]]))
    assert not first.any() and torch.equal(second, parts[1])
