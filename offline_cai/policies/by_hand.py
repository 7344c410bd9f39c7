"""Gradients by hand, for small networks on a CPU, where autograd's own work takes half as long as the products.

What autograd gives is the definition, and tests hold this to it. All of it is called without autograd.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from offline_cai.networks.mlp import Perceptron, last
from offline_cai.policies.networks import LOG_STD

_relu_backward = torch.ops.aten.threshold_backward


class Pass(NamedTuple):
    """A forward pass of a perceptron: what went into each layer, and what came out of the last [B, outputs]."""

    layers: list[tuple[Tensor, Tensor]]
    inputs: list[Tensor]
    out: Tensor

    def part(self, rows: slice) -> "Pass":
        """That of some of the rows."""
        return Pass(self.layers, [x[rows] for x in self.inputs], self.out[rows])

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
            _relu_backward.grad_input(gradient, y, 0, grad_input=gradient)
            torch.mm(x.t(), gradient, out=before.grad)
            torch.sum(gradient, 0, out=bias.grad)
            weight = before

    def to_input(self, gradient: float, width: int, rows: Tensor) -> Tensor:
        """The gradient of the last inputs [n, width] of some samples [n], for one number as that of their outputs."""
        weights = [weight for weight, _ in self.layers]
        weights[0] = weights[0][-width:]
        back = (gradient * weights[-1].t()).expand(rows.shape[0], -1)
        for weight, y in zip(weights[-2::-1], self.inputs[:0:-1], strict=True):
            back = _relu_backward(back, y.index_select(0, rows), 0).mm(weight.t())
        return back


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
    q = torch.cat([_regress(perceptron, x, wanted, unit) for perceptron in perceptrons], -1)
    error = (q - wanted[:, None]).view(-1)
    return 0.5 * error.dot(error), q.t()


def _regress(perceptron: Perceptron, x: Tensor, wanted: Tensor, unit: int) -> Tensor:
    """One of them, forward and backward at once: what lies between is in the cache still. It says [B, 1]."""
    one = run(perceptron, x)
    one.learn((one.out - wanted[:, None]).div_(unit))
    return one.out


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
    twice = u + u
    nats = torch.sub(twice, logsigmoid(twice), alpha=2).sub_(torch.addcmul(log_std, noise, noise, value=0.5))
    log_prob = nats.sum(-1).sub_(u.shape[-1] * (0.5 * math.log(2 * math.pi) + 2 * math.log(2)))
    return Squashed(u.tanh_(), log_prob, moved, free_log_std == log_std)
