"""Gradients by hand, for small networks on a CPU, where autograd's own work takes half as long as the products.

What autograd gives is the definition, and tests hold this to it. All of it is called without autograd.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from offline_cai.networks.mlp import Perceptron, last
from offline_cai.policies.networks import LOG_STD

_relu_backward = torch.ops.aten.threshold_backward.grad_input


class Pass(NamedTuple):
    """A forward pass of a perceptron: what went into each layer, and what came out of the last [B, outputs]."""

    layers: list[tuple[Tensor, Tensor]]
    inputs: list[Tensor]
    out: Tensor

    def learn(self, gradient: Tensor) -> None:
        """Set the gradients of the weights, for that of the output [B, outputs]."""
        *hidden, (weight, bias) = self.layers
        if weight.shape[1] == 1:
            torch.mm(self.inputs[-1].t(), gradient, out=weight.grad)
        else:  # as `last` has it
            weight.grad.copy_(gradient.t().mm(self.inputs[-1]).t())  # type: ignore[union-attr]
        torch.sum(gradient, 0, out=bias.grad)
        for (before, bias), x, y in zip(hidden[::-1], self.inputs[-2::-1], self.inputs[:0:-1], strict=True):
            gradient = gradient.mm(weight.t())
            _relu_backward(gradient, y, 0, grad_input=gradient)
            torch.mm(x.t(), gradient, out=before.grad)
            torch.sum(gradient, 0, out=bias.grad)
            weight = before

    def to_input(self, gradient: Tensor, width: int, rows: Tensor) -> Tensor:
        """The gradient of the last inputs [n, width] of some samples [n], for that of their output [n, outputs]."""
        for (weight, _), y in zip(self.layers[:0:-1], self.inputs[:0:-1], strict=True):
            gradient = gradient.mm(weight.t())
            _relu_backward(gradient, y.index_select(0, rows), 0, grad_input=gradient)
        return gradient.mm(self.layers[0][0][-width:].t())


def run(perceptron: Perceptron, x: Tensor) -> Pass:
    """x is [B, inputs]."""
    layers, inputs = perceptron.layers, [x]
    for weight, bias in layers[:-1]:
        inputs.append(torch.addmm(bias, inputs[-1], weight).relu_())
    weight, bias = layers[-1]
    return Pass(layers, inputs, last(inputs[-1], weight, bias))


def regress(perceptrons: Iterable[Perceptron], x: Tensor, wanted: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Half the squared errors, added up, of perceptrons at x [B, inputs] that should give `wanted` [B].

    Gives that sum [] and what the perceptrons say [count, B]; the weights get the gradients of sum / unit.
    """
    passes = [run(perceptron, x) for perceptron in perceptrons]
    said = torch.cat([one.out for one in passes], -1)
    error = said - wanted[:, None]
    for one, gradient in zip(passes, (error / unit).split(1, -1), strict=True):
        one.learn(gradient)
    flat = error.view(-1)
    return 0.5 * flat.dot(flat), said.t()


class Squashed(NamedTuple):
    """Reparametrised samples of squashed Gaussians: actions [B, A] and their log-probabilities [B]."""

    action: Tensor
    log_prob: Tensor
    moved: Tensor  # [B, A] du / dlog_std
    free: Tensor  # [B, A] whether log_std is inside its bounds

    def back(self, action: Tensor, log_prob: float) -> Tensor:
        """The gradient [B, 2A] of the actor's output, for those of the actions [B, A] and of every log_prob."""
        u = torch.addcmul(action, action * self.action, self.action, value=-1).add_(self.action, alpha=2 * log_prob)
        return torch.cat([u, (u * self.moved).sub_(log_prob).mul_(self.free)], -1)


def squash(out: Tensor, noise: Tensor) -> Squashed:
    """Samples of the squashed Gaussians that an actor's output [B, 2A] stands for, by noise [B, A]."""
    mean, free_log_std = out.chunk(2, -1)
    log_std = free_log_std.clamp(*LOG_STD)
    moved = log_std.exp() * noise
    u = mean + moved
    of_noise = torch.addcmul(log_std, noise, noise, value=0.5)
    nats = softplus(-2 * u).add_(u).mul_(2).sub_(of_noise)
    log_prob = nats.sum(-1).sub_(u.shape[-1] * (0.5 * math.log(2 * math.pi) + 2 * math.log(2)))
    return Squashed(torch.tanh(u), log_prob, moved, free_log_std == log_std)
