"""Distributions over actions: squashed Gaussian, Gaussian, categorical, behind one interface.

Actions are in unit space (`Spec.to_unit`): [-1, 1]^A, or one-hot over the joint choices; U is their width. Densities
and KLs are in nats. Draws are keyed and reparametrised; a categorical's are all of its choices, weighed by probability,
so that an expectation over them is exact.
"""

import math
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Discrete, Spec
from offline_cai.inference import soft

EDGE = 1 - 1e-6  # of actions that were stored and are taken back through atanh: u is at most 7.25


class Draw(NamedTuple):
    """n actions for each of B states; weights add up to one over n."""

    action: Tensor  # [n, B, U]
    log_prob: Tensor  # [n, B]
    weight: Tensor  # [n, B]

    def mean(self, x: Tensor) -> Tensor:
        """The expectation [B] of x [n, B]."""
        return x[0] if len(x) == 1 else (self.weight * x).sum(0)


class Distribution(Protocol):
    """pi(a | s) for B states."""

    @property
    def mode(self) -> Tensor:
        """The most likely action [B, U] (of a squashed Gaussian: that of its u)."""
        ...

    def sample(self, key: Tensor, stream: int = 0) -> tuple[Tensor, Tensor | None]:
        """An action [B, U] for each of keys [B], and its log-probability [B] if it is known."""
        ...

    def draw(self, key: Tensor, n: int = 1, stream: int = 0) -> Draw:
        """n actions for each of keys [B], or all choices; differentiable in the parameters."""
        ...

    def log_prob(self, action: Tensor) -> Tensor:
        """[..., B] for actions [..., B, U]."""
        ...

    def kl(self, other: Self) -> Tensor:
        """KL(this ‖ other) [B], in closed form."""
        ...

    def detach(self) -> Self: ...


class Gaussian(NamedTuple):
    """N(mean, std²) [B, A], not squashed: what it draws beyond the bounds is clipped where it acts."""

    mean: Tensor
    std: Tensor

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self, key: Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
        action, log_prob, _ = self.draw(key, 1, stream)
        return action[0], log_prob[0]

    def draw(self, key: Tensor, n: int = 1, stream: int = 0) -> Draw:
        noise = _normal(self.mean, key, n, stream)
        return _equal(self.mean + self.std * noise, _log_density(noise, self.std))

    def log_prob(self, action: Tensor) -> Tensor:
        return _log_density((action - self.mean) / self.std, self.std)

    def entropy(self) -> Tensor:
        """[B], in closed form."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: "Gaussian") -> Tensor:
        return soft.diagonal_gaussian_kl(self.mean, self.std, other.mean, other.std)

    def detach(self) -> "Gaussian":
        return Gaussian(self.mean.detach(), self.std.detach())


class SquashedGaussian(NamedTuple):
    """tanh(u) with u ~ N(mean, std²), mean and std [B, A] (Haarnoja et al. 2018, appendix C)."""

    mean: Tensor
    std: Tensor

    @property
    def mode(self) -> Tensor:
        return torch.tanh(self.mean)

    def sample(self, key: Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
        action, log_prob, _ = self.draw(key, 1, stream)
        return action[0], log_prob[0]

    def draw(self, key: Tensor, n: int = 1, stream: int = 0) -> Draw:
        noise = _normal(self.mean, key, n, stream)
        u = self.mean + self.std * noise
        return _equal(torch.tanh(u), _log_density(noise, self.std) - soft.log_det_tanh(u).sum(-1))

    def log_prob(self, action: Tensor) -> Tensor:
        """Of stored actions: one at the very bound counts as if just inside, since its u is lost."""
        u = torch.atanh(action.to(self.mean.dtype).clamp(-EDGE, EDGE))
        return soft.squashed_gaussian_log_prob(u, self.mean, self.std)

    def kl(self, other: "SquashedGaussian") -> Tensor:
        """That of the Gaussians of u: a one-to-one map leaves a KL as it is."""
        return soft.diagonal_gaussian_kl(self.mean, self.std, other.mean, other.std)

    def detach(self) -> "SquashedGaussian":
        return SquashedGaussian(self.mean.detach(), self.std.detach())


class Categorical(NamedTuple):
    """Over n choices, by log-probabilities [B, n]."""

    log_p: Tensor

    @property
    def mode(self) -> Tensor:
        return _one_hot(self.log_p.argmax(-1), self.log_p)

    def sample(self, key: Tensor, stream: int = 0) -> tuple[Tensor, Tensor]:
        ladder = self.log_p.exp().cumsum(-1)
        u = seeding.uniform(key, (1,), stream).to(ladder) * ladder[..., -1:]
        chosen = (u >= ladder).sum(-1).clamp(max=ladder.shape[-1] - 1)
        return _one_hot(chosen, self.log_p), self.log_p.gather(-1, chosen[..., None])[..., 0]

    def draw(self, key: Tensor, n: int = 1, stream: int = 0) -> Draw:
        count = self.log_p.shape[-1]
        action = torch.eye(count, dtype=self.log_p.dtype, device=self.log_p.device)[:, None]
        log_prob = self.log_p.movedim(-1, 0)
        return Draw(action.expand(count, len(self.log_p), count), log_prob, log_prob.exp())

    def log_prob(self, action: Tensor) -> Tensor:
        return (self.log_p * action).sum(-1)

    def entropy(self) -> Tensor:
        """[B]."""
        return -(self.log_p.exp() * self.log_p).sum(-1)

    def kl(self, other: "Categorical") -> Tensor:
        return (self.log_p.exp() * (self.log_p - other.log_p)).sum(-1)

    def detach(self) -> "Categorical":
        return Categorical(self.log_p.detach())


def log_uniform(spec: Spec) -> float:
    """log-density in nats of the uniform prior: 1/n for choices, 2^-A in unit space."""
    return -math.log(spec.unit_width) if isinstance(spec.action, Discrete) else -spec.action_width * math.log(2)


def _normal(like: Tensor, key: Tensor, n: int, stream: int) -> Tensor:
    """[n, B, A]."""
    return seeding.normal(key, (n, like.shape[-1]), stream, like.dtype).transpose(0, 1)


def _log_density(noise: Tensor, std: Tensor) -> Tensor:
    return (-0.5 * (noise.square() + math.log(2 * math.pi)) - std.log()).sum(-1)


def _equal(action: Tensor, log_prob: Tensor) -> Draw:
    return Draw(action, log_prob, torch.full_like(log_prob, 1 / len(action)))


def _one_hot(index: Tensor, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(index, like.shape[-1]).to(like.dtype)
