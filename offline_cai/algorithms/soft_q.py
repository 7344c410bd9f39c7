"""Soft Q-learning: the posterior under a uniform prior itself, by a value that is a log-partition and a Stein sampler.

Haarnoja et al. 2017 (arXiv 1702.08165). The soft value is an importance-sampled integral over actions; actions come
from a network that noise drives, trained by amortised Stein variational gradient (Wang and Liu 2016). Kernel, particles
and score all live in u = atanh(a), so the sampler's fixed point is exp(Q / temperature) over actions. Stein's direction
is local: modes that lie far apart get shares that depend on where the particles came from. It explores by samples. In
evaluations, where other actors play their mode, which is not known here, it plays the best of `particles` samples by Q.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from offline_cai import seeding
from offline_cai.core import Batch, Discrete, Loss, Needs, Spec, Step
from offline_cai.data.codec import NormaliserKind
from offline_cai.errors import UserError
from offline_cai.inference import soft, svgd
from offline_cai.networks.mlp import Perceptron
from offline_cai.policies import dial
from offline_cai.policies.acting import ActorAlgorithm, check_bootstrap
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.distributions import log_uniform
from offline_cai.policies.networks import Critic, follow, slow

VALUE, ACTOR = 0, 1  # streams of noise
SINGULAR = -20.0  # nats: the least log-determinant of the sampler's Jacobian


@dataclass(frozen=True)
class SoftQConfig:
    """Critic, sampler and temperature."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of critic and sampler."""
    temperature: Temperature = "auto"
    """Reward per nat of entropy (the paper's reward scale is its inverse); auto: found so that the KL from the uniform
    prior meets `kl_budget`."""
    kl_budget: float | None = None
    """Nats from the uniform prior; null with temperature auto: 1 for each action component."""
    samples: int = 32
    """Actions that the soft value of a state is estimated from."""
    proposal: Literal["uniform", "policy"] = "uniform"
    """Where they come from: all of the box, or the sampler, whose density is told by its Jacobian (as if no two noises
    gave the same action)."""
    particles: int = 16
    """Actions of a state that the sampler is moved at, and as many that tell where to; and those of which the best by Q
    is played in an evaluation."""
    discount: float = 0.99
    """Per step."""
    tau: float = 0.005
    """Share of the way that the slow critic moves each time."""
    interval: int = 1
    """Updates between its moves; the paper's hard copies are tau 1 at interval 1000."""
    normaliser: NormaliserKind = "none"
    """Of observations, fitted to a dataset if there is one."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        check_bootstrap(self.discount, self.tau)
        if self.samples < 2 or self.particles < 2 or self.interval < 1:
            raise UserError("samples and particles have to be at least 2, interval at least 1.")


class Sampler(nn.Module):
    """u = f(s, noise) with as many components as the action tanh(u); noise is standard normal."""

    def __init__(self, spec: Spec, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.width = spec.action_width
        self.body = Perceptron(spec.obs_width + self.width, hidden, self.width)

    def noise(self, key: Tensor, n: int, stream: int = 0) -> Tensor:
        """[n, B, A] for keys [B]."""
        return seeding.normal(key, (n, self.width), stream, next(self.parameters()).dtype).transpose(0, 1)

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """[n, B, A] for observations [B, O] and noise [n, B, A]."""
        return self.body(torch.cat([obs.expand(len(noise), *obs.shape), noise], -1))

    @torch.enable_grad()
    def with_density(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [n, B, A] and their log-densities [n, B], if f is one-to-one (appendix C.2); without gradients."""
        noise = noise.clone().requires_grad_()
        u = self(obs, noise)
        rows = [torch.autograd.grad(x.sum(), noise, retain_graph=True)[0] for x in u.unbind(-1)]
        stretch = torch.linalg.slogdet(torch.stack(rows, -2))[1].clamp(min=SINGULAR) + soft.log_det_tanh(u).sum(-1)
        normal = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1)
        return torch.tanh(u).detach(), (normal - stretch).detach()


class Samples(NamedTuple):
    """pi(a | s) at normalised observations [B, O], known by its samples alone."""

    sampler: Sampler
    critic: Critic
    obs: Tensor
    tries: int

    @property
    def mode(self) -> Tensor:
        """The action [B, A] of the highest Q among `tries` samples, whose noise is always the same."""
        key = torch.zeros(len(self.obs), dtype=torch.int64, device=self.obs.device)
        action = torch.tanh(self.sampler(self.obs, self.sampler.noise(key, self.tries)))
        best = self.critic(self.obs, action)[0].argmax(0)
        return action[best, torch.arange(len(best))]

    def sample(self, key: Tensor, stream: int = 0) -> tuple[Tensor, None]:
        """An action [B, A] for each of keys [B]."""
        return torch.tanh(self.sampler(self.obs, self.sampler.noise(key, 1, stream)))[0], None


class SoftQ(ActorAlgorithm):
    Config = SoftQConfig
    config: SoftQConfig
    actor: Sampler  # type: ignore[assignment]
    updates: Tensor
    no_density = "its distribution over actions is known by samples alone"

    def __init__(self, spec: Spec, config: SoftQConfig) -> None:
        if isinstance(spec.action, Discrete):
            raise UserError("soft_q samples continuous actions, and here they are choices: sac sums over all of them.")
        super().__init__(spec, config, config.normaliser)
        self.actor = Sampler(spec, config.hidden)
        self.critic = Critic(spec, config.hidden, count=1)
        self.target = slow(self.critic)
        self.dial = Dial(config.temperature, config.kl_budget, spec.action_width)
        if self.dial.budget is not None and self.dial.budget >= math.log(config.samples):
            raise UserError(
                f"model.samples is {config.samples}, and so few uniform actions cannot tell whether the policy is "
                f"{self.dial.budget:g} nats from uniform (log {config.samples} is {math.log(config.samples):.2g}): "
                "take more samples, or a smaller kl_budget."
            )
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def needs(self) -> Needs:
        groups = {"critic": ("critic.", "dial."), "actor": ("actor.",)}
        return Needs(discount=self.config.discount, source="replay", groups=groups)

    def pi(self, obs: np.ndarray) -> Samples:  # type: ignore[override]
        like = self.normaliser.shift
        encoded = self.normaliser.encode(torch.as_tensor(obs, dtype=like.dtype, device=like.device))
        return Samples(self.actor, self.critic, encoded, self.config.particles)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        return self._critic(batch) if phase == "critic" else self._actor(batch)

    def _critic(self, batch: Batch) -> Loss:
        """Squared soft Bellman error (equation 11), and the temperature's dual."""
        step = batch.transition
        obs, after = self.normaliser.encode(step.obs), self.normaliser.encode(step.next_obs)
        value, kl = self.soft_value(after, batch.key)
        wanted = step.reward + self.config.discount * torch.where(step.terminal, 0.0, value)
        q = self.critic(obs, self.spec.to_unit(step.action[:, 0]))[0]
        terms = {"critic_loss": 0.5 * (q - wanted).square().sum()}
        if self.dial.learned:
            terms["temperature_loss"] = self.dial.loss(kl).sum()
        return Loss(
            terms,
            len(obs),
            {"q": q.detach().sum(), "kl": kl.sum(), "temperature": self.dial.temperature * len(obs)},
        )

    @torch.no_grad()
    def soft_value(self, obs: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """temperature · log ∫ exp(Q / temperature) da (equation 10), and the KL from uniform of exp(Q / temperature),
        [B] each, by the slow critic and importance sampling."""
        n, temperature = self.config.samples, self.dial.temperature
        if self.config.proposal == "uniform":
            action = 2 * seeding.uniform(key, (n, self.spec.action_width), VALUE).to(obs).transpose(0, 1) - 1
            log_weight = torch.full_like(action[..., 0], -log_uniform(self.spec))
        else:
            action, log_density = self.actor.with_density(obs, self.actor.noise(key, n, VALUE))
            log_weight = -log_density
        q = self.target(obs, action)[0]
        value = soft.soft_value_from_samples(q, temperature, log_weight, dim=0)
        weight = (q / temperature + log_weight).softmax(0)
        return value, ((weight * q).sum(0) - value) / temperature - log_uniform(self.spec)

    def _actor(self, batch: Batch) -> Loss:
        """Amortised Stein variational gradient (equations 13 and 14): its gradient is what the loss is made for."""
        obs, k = self.normaliser.encode(batch.transition.obs), self.config.particles
        u = self.actor(obs, self.actor.noise(batch.key, 2 * k, ACTOR))
        fixed, moved = u[:k].detach().requires_grad_(), u[k:]
        with torch.enable_grad():
            q = self.critic(obs, torch.tanh(fixed))[0]
            log_density = q / self.dial.temperature + soft.log_det_tanh(fixed).sum(-1)
            score = torch.autograd.grad(log_density.sum(), fixed)[0]
        direction = svgd.stein_direction(*(x.movedim(0, 1) for x in (fixed, score, moved)))
        loss = -(direction * moved.movedim(0, 1)).sum((1, 2)) / k
        return Loss({"actor_loss": loss.sum()}, len(obs), {"stein": direction.norm(dim=-1).mean(-1).sum()})

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        metrics = step(batch, "critic") | step(batch, "actor")
        self.updates += 1
        if int(self.updates) % self.config.interval == 0:
            follow(self.target, self.critic, self.config.tau)
        return metrics
