"""Soft actor-critic: the posterior under a uniform prior, by reverse KL onto a squashed Gaussian (or a categorical).

Haarnoja et al. 2018b (arXiv 1812.05905): twin critics, automatic temperature. Choices: Christodoulou 2019, with exact
expectations in place of samples.
"""

from dataclasses import dataclass

import torch

from offline_cai.core import Batch, Loss, Needs, Spec, Step
from offline_cai.data.codec import NormaliserKind
from offline_cai.errors import UserError
from offline_cai.policies import dial
from offline_cai.policies.acting import ActorAlgorithm
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.distributions import log_uniform
from offline_cai.policies.networks import Actor, Critic, follow, slow

NEXT, NOW = 0, 1  # streams of noise


@dataclass(frozen=True)
class SACConfig:
    """Actor, critics and temperature."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    temperature: Temperature = "auto"
    """Reward per nat of entropy; auto: found so that the KL from the uniform prior meets `kl_budget`."""
    kl_budget: float | None = None
    """Nats from the uniform prior; null with temperature auto: an entropy of -1 nat per action component."""
    discount: float = 0.99
    """Per step."""
    tau: float = 0.005
    """Share of the way that target critics move at each update."""
    normaliser: NormaliserKind = "none"
    """Of observations, fitted to a dataset if there is one."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        if not 0 <= self.discount < 1 or not 0 < self.tau <= 1:
            raise UserError("discount has to be in [0, 1), tau in (0, 1].")


class SAC(ActorAlgorithm):
    Config = SACConfig
    config: SACConfig

    def __init__(self, spec: Spec, config: SACConfig) -> None:
        super().__init__(spec, config, config.normaliser)
        self.actor = Actor(spec, config.hidden)
        self.critic = Critic(spec, config.hidden, count=2)
        self.target = slow(self.critic)
        auto = spec.action_width - log_uniform(spec)  # an entropy of -|A| is that far from uniform
        self.dial = Dial(config.temperature, config.kl_budget, auto)

    @property
    def needs(self) -> Needs:
        groups = {"critic": ("critic.",), "actor": ("actor.", "dial.") if self.dial.learned else ("actor.",)}
        return Needs(discount=self.config.discount, source="replay", groups=groups)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        return self._critic(batch) if phase == "critic" else self._actor(batch)

    def _critic(self, batch: Batch) -> Loss:
        """Squared soft Bellman error (equations 5 and 6), with the minimum of two target critics."""
        step, temperature = batch.transition, self.dial.temperature
        obs, after = self.normaliser.encode(step.obs), self.normaliser.encode(step.next_obs)
        with torch.no_grad():
            draw = self.actor(after).draw(batch.key, stream=NEXT)
            value = draw.mean(self.target(after, draw.action).amin(0) - temperature * draw.log_prob)
            wanted = step.reward + self.config.discount * torch.where(step.terminal, 0.0, value)
        q = self.critic(obs, self.spec.to_unit(step.action[:, 0]))
        metrics = {"q": q.detach().mean(0).sum()}
        return Loss({"critic_loss": 0.5 * (q - wanted).square().sum()}, len(obs), metrics)

    def _actor(self, batch: Batch) -> Loss:
        """KL to exp(Q / temperature), times the temperature (equation 7), and the temperature's dual (equation 18)."""
        obs, temperature = self.normaliser.encode(batch.transition.obs), self.dial.temperature
        draw = self.actor(obs).draw(batch.key, stream=NOW)
        q = self.critic(obs, draw.action).amin(0)
        terms = {"actor_loss": draw.mean(temperature * draw.log_prob - q).sum()}
        kl = draw.mean(draw.log_prob) - log_uniform(self.spec)
        if self.dial.learned:
            terms["temperature_loss"] = self.dial.loss(kl).sum()
        return Loss(terms, len(obs), {"kl": kl.detach().sum(), "temperature": temperature * len(obs)})

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        metrics = step(batch, "critic") | step(batch, "actor")
        follow(self.target, self.critic, self.config.tau)
        return metrics
