"""Behaviour priors p(a | s) that are learned from data, behind one interface: a loss, draws, and a density if any.

Observations [B, O] are those that a normaliser gives, actions [..., B, U] are in unit space.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from offline_cai import seeding
from offline_cai.core import Discrete, Known, Spec
from offline_cai.diffusion.sampler import dpm_solver
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from offline_cai.networks.mlp import mlp
from offline_cai.policies.distributions import Categorical, Draw, Gaussian, SquashedGaussian
from offline_cai.policies.networks import Actor

PriorKind = Literal["gaussian", "squashed", "mixture", "diffusion"]
SCALE = 2.0  # of actions in a diffusion: brings those in [-1, 1] near unit variance, where its levels are made for
LOG_STD = (-5.0, 1.0)  # of a mixture's components: none collapses onto one action


class Prior(nn.Module, ABC):
    """p(a | s)."""

    @abstractmethod
    def loss(self, obs: Tensor, action: Tensor, key: Tensor) -> Tensor:
        """What is minimised for the data's actions, [B]; its noise comes from keys [B]."""

    @abstractmethod
    def draw(self, obs: Tensor, key: Tensor, n: int, stream: int = 0) -> Draw:
        """n actions of each state, or all choices, without gradients; log_prob is NaN where there is no density."""


def build(kind: PriorKind, spec: Spec, hidden: Sequence[int], components: int, levels: int, steps: int) -> Prior:
    """The prior of that kind; of choices it is a categorical.

    Raises:
        UserError: a mixture or a diffusion of choices.
    """
    if kind == "gaussian" or kind == "squashed":
        return DensityPrior(Actor(spec, hidden, kind))
    if isinstance(spec.action, Discrete):
        raise UserError(f"the prior {kind} is one of continuous actions, and these are choices: take prior gaussian.")
    if kind == "mixture":
        return DensityPrior(Mixtures(spec, hidden, components))
    return DiffusionPrior(spec, hidden, levels, steps)


class DensityPrior(Prior):
    """A network that gives a distribution, by maximum likelihood."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def at(self, obs: Tensor) -> "Categorical | Gaussian | SquashedGaussian | Mixture":
        return self.network(obs)

    def loss(self, obs: Tensor, action: Tensor, key: Tensor) -> Tensor:
        return -self.log_prob(obs, action)

    @torch.no_grad()
    def draw(self, obs: Tensor, key: Tensor, n: int, stream: int = 0) -> Draw:
        return self.at(obs).draw(key, n, stream)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """[..., B] for actions [..., B, U]."""
        return self.at(obs).log_prob(action)


class Mixture(NamedTuple):
    """K Gaussians for each state, not squashed. Its draws are not differentiable in the parameters."""

    log_weight: Tensor  # [B, K]
    mean: Tensor  # [B, K, A]
    std: Tensor  # [B, K, A]

    def draw(self, key: Tensor, n: int = 1, stream: int = 0) -> Draw:
        """n actions for each of keys [B]."""
        u = seeding.uniform(key, (n, 1), 2 * stream).to(self.mean)
        ladder = self.log_weight.exp().cumsum(-1)[:, None]
        chosen = (u * ladder[..., -1:] >= ladder).sum(-1).clamp(max=ladder.shape[-1] - 1)  # [B, n]
        at = chosen[..., None].expand(-1, -1, self.mean.shape[-1])
        noise = seeding.normal(key, tuple(at.shape[1:]), 2 * stream + 1, self.mean.dtype)
        action = (self.mean.gather(1, at) + self.std.gather(1, at) * noise).transpose(0, 1)
        log_prob = self.log_prob(action)
        return Draw(action, log_prob, torch.full_like(log_prob, 1 / n))

    def log_prob(self, action: Tensor) -> Tensor:
        """[..., B] for actions [..., B, A]."""
        z = (action[..., None, :] - self.mean) / self.std
        each = (-0.5 * (z.square() + math.log(2 * math.pi)) - self.std.log()).sum(-1)
        return torch.logsumexp(self.log_weight + each, -1)


class Mixtures(nn.Module):
    """A perceptron that gives a `Mixture`; the components begin apart."""

    def __init__(self, spec: Spec, hidden: Sequence[int], components: int) -> None:
        super().__init__()
        self.components, self.width = components, spec.unit_width
        self.body = mlp(spec.obs_width, hidden, components * (1 + 2 * self.width))
        means = self.body[-1].bias.view(components, -1)[:, 1 : 1 + self.width]  # type: ignore[operator]
        with torch.no_grad():
            means.uniform_(-1, 1)

    def forward(self, obs: Tensor) -> Mixture:
        """The mixture at observations [B, O]."""
        out = self.body(obs).unflatten(-1, (self.components, -1))
        weight, mean, log_std = out.split([1, self.width, self.width], -1)
        return Mixture(weight[..., 0].log_softmax(-1), torch.tanh(mean), log_std.clamp(*LOG_STD).exp())


class DiffusionPrior(Prior):
    """A denoiser of actions given the state, predicting velocities (Ho et al. 2020; Salimans and Ho 2022).

    Draws are DPM-Solver++'s, with estimates within the bounds. It has no density: what needs one has to do without.
    """

    def __init__(self, spec: Spec, hidden: Sequence[int], levels: int, steps: int) -> None:
        super().__init__()
        self.schedule, self.steps, self.width = Schedule(levels, "cosine"), steps, spec.unit_width
        self.body = mlp(spec.obs_width + self.width + 2, hidden, self.width, nn.SiLU)

    def velocity(self, obs: Tensor, x: Tensor, k: Tensor) -> Tensor:
        """[N, 1, A] for observations [N, O], noisy actions [N, 1, A] and levels [N]."""
        abar = self.schedule.abar_at(k)[:, :, 0]
        return self.body(torch.cat([obs, x[:, 0], abar.sqrt(), (1 - abar).sqrt()], -1))[:, None]

    def loss(self, obs: Tensor, action: Tensor, key: Tensor) -> Tensor:
        """Squared error of the velocity at a level drawn at random."""
        k = seeding.integers(key, self.schedule.levels).to(obs.device)
        x = SCALE * action[:, None]
        noise = seeding.normal(key, tuple(x.shape[1:]), stream=1, dtype=x.dtype).to(obs.device)
        error = self.velocity(obs, self.schedule.add_noise(x, noise, k), k) - self.schedule.velocity(x, noise, k)
        return error.square().sum((1, 2))

    @torch.no_grad()
    def draw(self, obs: Tensor, key: Tensor, n: int, stream: int = 0) -> Draw:
        repeated = obs.repeat_interleave(n, 0)

        def denoise(x: Tensor, k: Tensor) -> Tensor:
            return self.schedule.clean_from_velocity(x, self.velocity(repeated, x, k), k)

        free = obs.new_zeros(len(repeated), 1, self.width)
        keys = seeding.split(key + stream, n).flatten()
        x = dpm_solver(denoise, self.schedule, Known(free, free.bool()), keys, self.steps, clip=SCALE)
        action = (x / SCALE).view(len(obs), n, -1).transpose(0, 1)
        return Draw(action, torch.full_like(action[..., 0], math.nan), torch.full_like(action[..., 0], 1 / n))
