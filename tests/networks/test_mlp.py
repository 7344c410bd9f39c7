"""Perceptrons, whose last layer is multiplied the other way round where it is narrow."""

import pytest
import torch
from torch.nn.functional import linear, relu

from offline_cai.networks.mlp import Perceptron


@pytest.mark.parametrize("outputs", [1, 2, 7])
@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3)])
def test_a_perceptron_is_its_linear_layers(outputs: int, shape: tuple[int, ...], float64: None) -> None:
    torch.manual_seed(0)
    perceptron, x = Perceptron(3, (6, 4), outputs), torch.randn(shape)
    wanted = x
    for i, (weight, bias) in enumerate(perceptron.layers):
        wanted = linear(relu(wanted) if i else wanted, weight.T, bias)
    assert torch.allclose(perceptron(x), wanted, atol=1e-12) and perceptron(x).shape == (*shape[:-1], outputs)
