"""Networks of actors and critics, and slow copies of them. Observations are those that a normaliser gives."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from offline_cai.core import Discrete, Spec
from offline_cai.networks.mlp import Perceptron
from offline_cai.policies.distributions import Categorical, Gaussian, SquashedGaussian

Family = Literal["squashed", "gaussian"]
LOG_STD = (-20.0, 2.0)  # of squashed Gaussians (Haarnoja et al. 2018)
M = TypeVar("M", bound=nn.Module)


class Actor(nn.Module):
    """pi(a | s) by a perceptron: a categorical where actions are choices, else one of two families.

    - squashed: tanh of a Gaussian whose mean and standard deviation depend on the state.
    - gaussian: mean in [-1, 1], and one standard deviation for each component, learned, or fixed to `std`.
    """

    def __init__(
        self, spec: Spec, hidden: Sequence[int], family: Family = "squashed", std: float | None = None
    ) -> None:
        super().__init__()
        self.choices, self.family = isinstance(spec.action, Discrete), family
        two = family == "squashed" and not self.choices
        self.body = Perceptron(spec.obs_width, hidden, spec.unit_width * (2 if two else 1))
        if family == "gaussian" and not self.choices:
            log_std = torch.full((spec.unit_width,), math.log(0.5 if std is None else std))
            self.log_std = nn.Parameter(log_std, requires_grad=std is None)

    def forward(self, obs: Tensor) -> Categorical | Gaussian | SquashedGaussian:
        """The distribution at observations [B, O]."""
        return self.law(self.body(obs))

    def law(self, out: Tensor) -> Categorical | Gaussian | SquashedGaussian:
        """The distribution that the perceptron's outputs [B, ...] stand for."""
        if self.choices:
            return Categorical(out.log_softmax(-1))
        if self.family == "gaussian":
            return Gaussian(torch.tanh(out), self.log_std.clamp(*LOG_STD).exp().expand_as(out))
        mean, log_std = out.chunk(2, -1)
        return SquashedGaussian(mean, log_std.clamp(*LOG_STD).exp())


class Critic(nn.Module):
    """Q(s, a) by `count` perceptrons side by side; of choices each gives all values at once."""

    def __init__(self, spec: Spec, hidden: Sequence[int], count: int = 2) -> None:
        super().__init__()
        self.choices = isinstance(spec.action, Discrete)
        sizes = (spec.obs_width, spec.unit_width) if self.choices else (spec.obs_width + spec.unit_width, 1)
        each = nn.ModuleList(Perceptron(sizes[0], hidden, sizes[1]) for _ in range(count))
        self.each: Iterable[Perceptron] = each  # type: ignore[assignment]

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """[count, ..., B] for observations [B, O] and actions [..., B, U] (of choices also probabilities)."""
        if self.choices:
            return torch.stack([(q(obs) * action).sum(-1) for q in self.each])
        both = torch.cat([obs.expand(*action.shape[:-1], obs.shape[-1]), action], -1)
        return torch.stack([q(both)[..., 0] for q in self.each])


class Value(nn.Module):
    """V(s) by a perceptron."""

    def __init__(self, spec: Spec, hidden: Sequence[int]) -> None:
        super().__init__()
        self.body = Perceptron(spec.obs_width, hidden, 1)

    def forward(self, obs: Tensor) -> Tensor:
        """[..., B] for observations [..., B, O]."""
        return self.body(obs)[..., 0]


class ScaledValue(Value):
    """V(s) = scale · perceptron(s), so that the perceptron's targets are of order one in any unit of reward."""

    scale: Tensor

    def __init__(self, spec: Spec, hidden: Sequence[int]) -> None:
        super().__init__(spec, hidden)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, obs: Tensor) -> Tensor:
        return self.scale * super().forward(obs)

    @torch.no_grad()
    def rescale(self, scale: Tensor) -> None:
        """Another scale, if it is not zero, for the same function (PopArt: van Hasselt et al. 2016, proposition 1)."""
        scale = torch.where(scale > 0, scale, self.scale)
        for p in self.body.layers[-1]:
            p.mul_(self.scale / scale)
        self.scale.copy_(scale)


def slow(module: M) -> M:
    """A copy without gradients, to be moved by `follow`."""
    return copy.deepcopy(module).requires_grad_(False)


def frozen(module: nn.Module, *inputs: Tensor) -> Tensor:
    """What a module gives, with its parameters for constants: gradients go on to the inputs alone."""
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, inputs)


@torch.no_grad()
def follow(target: nn.Module, module: nn.Module, rate: float) -> None:
    """Move the target's parameters that share of the way to the module's: 1 copies them."""
    torch._foreach_lerp_(_parameters(target), _parameters(module), rate)


def _parameters(module: nn.Module) -> list[Tensor]:
    """As `parameters()`, which takes longer than moving small networks does; none may be shared."""
    own = [p for p in module._parameters.values() if p is not None]
    return own + [p for part in module._modules.values() if part is not None for p in _parameters(part)]
