"""Multi-layer perceptrons."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def mlp(
    inputs: int, hidden: Sequence[int], outputs: int, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """Linear layers [.., inputs] -> [.., outputs] with an activation after each but the last."""
    widths = [inputs, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))


class Perceptron(nn.Module):
    """The same with ReLUs, for the small networks of actors and critics, where what is no matrix product counts.

    A weight is [inputs, outputs], so that both products of its backward pass read rows as they lie.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        for i, (before, after) in enumerate(pairwise([inputs, *hidden, outputs])):
            layer = nn.Linear(before, after)
            self.register_parameter(f"weight_{i}", nn.Parameter(layer.weight.detach().T.contiguous()))
            self.register_parameter(f"bias_{i}", nn.Parameter(layer.bias.detach()))

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer."""
        parameters: list[Any] = list(self._parameters.values())
        return list(zip(parameters[::2], parameters[1::2], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        *hidden, (weight, bias) = self.layers
        y = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
        for w, b in hidden:
            y = torch.addmm(b, y, w).relu_()
        y = last(y, weight, bias)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], -1)


def last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A perceptron's last layer, [B, inputs] -> [B, outputs].

    Its columns lie in one piece, where there are several: else a product of a few takes four times as long.
    """
    if weight.shape[1] == 1:
        return torch.addmm(bias, x, weight)
    return torch.addmm(bias[:, None], weight.t(), x.t()).t()
