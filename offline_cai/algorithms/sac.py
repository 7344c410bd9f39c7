"""Soft actor-critic: the posterior under a uniform prior, by reverse KL onto a squashed Gaussian (or a categorical).

Two forms. Haarnoja et al. 2018b (arXiv 1812.05905): twin critics that bootstrap from slow copies of themselves, and a
temperature that is found. Haarnoja et al. 2018a (arXiv 1801.01290): twin critics that bootstrap from a slow copy of a
separate V(s). Choices: Christodoulou 2019, with exact expectations in place of samples.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Batch, Loss, Needs, Spec, Step, Transition
from offline_cai.data.codec import NormaliserKind
from offline_cai.policies import by_hand, dial
from offline_cai.policies.acting import ActorAlgorithm, check_bootstrap
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.distributions import log_uniform
from offline_cai.policies.networks import Actor, Critic, Value, follow, slow

VALUE, ACTOR = 0, 1  # streams of noise


@dataclass(frozen=True)
class SACConfig:
    """Actor, critics and temperature."""

    form: Literal["twin", "value"] = "twin"
    """What critics bootstrap from: twin, slow copies of them (2018b); value, a slow copy of a separate V (2018a)."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of all networks."""
    temperature: Temperature = "auto"
    """Reward per nat of entropy; auto: found so that the KL from the uniform prior meets `kl_budget`."""
    kl_budget: float | None = None
    """Nats from the uniform prior; null with temperature auto: an entropy of -1 nat per action component."""
    discount: float = 0.99
    """Per step."""
    tau: float = 0.005
    """Share of the way that slow copies move at each update."""
    normaliser: NormaliserKind = "none"
    """Of observations, fitted to a dataset if there is one."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        check_bootstrap(self.discount, self.tau)


class SAC(ActorAlgorithm):
    Config = SACConfig
    config: SACConfig

    def __init__(self, spec: Spec, config: SACConfig) -> None:
        super().__init__(spec, config, config.normaliser)
        self.actor = Actor(spec, config.hidden)
        self.critic = Critic(spec, config.hidden, count=2)
        self.value = Value(spec, config.hidden) if config.form == "value" else None
        self.target: Critic | Value = slow(self.value or self.critic)
        auto = spec.action_width - log_uniform(spec)  # an entropy of -|A| is that far from uniform
        self.dial = Dial(config.temperature, config.kl_budget, auto)

    @property
    def needs(self) -> Needs:
        groups: dict[str, tuple[str, ...]] = {"value": ("value.",)} if self.value else {}
        groups |= {"critic": ("critic.",), "actor": ("actor.", "dial.")}
        return Needs(discount=self.config.discount, source="replay", groups=groups)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        return {"value": self._value, "critic": self._critic, "actor": self._actor}[phase](batch)

    def _value(self, batch: Batch) -> Loss:
        """Squared distance of V from the soft value (2018a, equation 5)."""
        assert self.value is not None
        obs = self.normaliser.encode(batch.transition.obs)
        error = self.value(obs) - self._soft_value(obs, self.critic, batch.key)
        return Loss({"value_loss": 0.5 * error.square().sum()}, len(obs))

    def _critic(self, batch: Batch) -> Loss:
        """Squared soft Bellman error (2018a, equation 7; 2018b, equation 5)."""
        step = batch.transition
        q = self.critic(*self.now(batch))
        loss = 0.5 * (q - self.backup(step, self.after(step, batch.key))).square().sum()
        return Loss({"critic_loss": loss}, len(step.obs), {"q": q.detach().mean(0).sum()})

    def backup(self, step: Transition, value: Tensor) -> Tensor:
        """What Q(s, a) should be [B]: r + discount · V(s'), for V(s') [B]."""
        return step.reward + self.config.discount * torch.where(step.terminal, 0.0, value)

    @torch.no_grad()
    def after(self, step: Transition, key: Tensor) -> Tensor:
        """V(s') [B], by the slow copy."""
        obs = self.normaliser.encode(step.next_obs)
        return self._soft_value(obs, self.target, key) if isinstance(self.target, Critic) else self.target(obs)

    @torch.no_grad()
    def _soft_value(self, obs: Tensor, critic: Critic, key: Tensor) -> Tensor:
        """E[min Q - temperature · log pi] [B] at normalised observations (2018b, equation 3)."""
        draw = self.actor(obs).draw(key, stream=VALUE)
        return draw.mean(critic(obs, draw.action).amin(0) - self.dial.temperature * draw.log_prob)

    def _actor(self, batch: Batch) -> Loss:
        """KL to exp(Q / temperature), times the temperature (2018b, equation 7), and the temperature's dual (18)."""
        obs, temperature = self.normaliser.encode(batch.obs[:, 0]), self.dial.temperature
        draw = self.actor(obs).draw(batch.key, stream=ACTOR)
        q = self.critic(obs, draw.action).amin(0)
        terms = {"actor_loss": draw.mean(temperature * draw.log_prob - q).sum()}
        kl = draw.mean(draw.log_prob) - log_uniform(self.spec)
        if self.dial.learned:
            terms["temperature_loss"] = self.dial.loss(kl).sum()
        return Loss(terms, len(obs), {"kl": kl.detach().sum(), "temperature": temperature * len(obs)})

    @torch.no_grad()
    def by_hand(self, batch: Batch, phase: str, unit: int) -> Loss | None:
        if self.actor.choices or phase == "value":
            return None
        n, width, temperature = len(batch.key), self.spec.action_width, float(self.dial.temperature)
        if phase == "critic":
            step, (obs, after) = batch.transition, self.normaliser.encode(batch.obs[:, :2]).unbind(1)
            x = torch.cat([obs, self.spec.to_unit(batch.action[:, 0, 0])], -1)
            if isinstance(self.target, Critic):
                noise = seeding.normal(batch.key, (width,), VALUE, x.dtype)
                draw = by_hand.squash(by_hand.run(self.actor.body, after).out, noise)
                said = torch.cat([after, draw.action], -1)
                value = torch.minimum(*(q(said) for q in self.target.each))[:, 0] - temperature * draw.log_prob
            else:
                value = self.target(after)
            loss, q = by_hand.regress(self.critic.each, x, self.backup(step, value), unit)
            return Loss({"critic_loss": loss}, n, {"q": q.sum() / len(q)})
        obs = self.normaliser.encode(batch.obs[:, 0])
        actor = by_hand.run(self.actor.body, obs)
        draw = by_hand.squash(actor.out, seeding.normal(batch.key, (width,), ACTOR, obs.dtype))
        both = torch.cat([obs, draw.action], -1)
        one, two = (by_hand.run(q, both) for q in self.critic.each)
        least, slope = (one.out < two.out)[:, 0], torch.empty_like(draw.action)
        for critic, own in ((one, least), (two, ~least)):  # a sample goes back through the critic that says less, alone
            rows = own.nonzero()[:, 0]
            slope.index_copy_(0, rows, critic.to_input(obs.new_full((rows.shape[0], 1), -1 / unit), width, rows))
        actor.learn(draw.back(slope, temperature / unit))
        nats, worth = draw.log_prob.sum(), torch.minimum(one.out, two.out).sum()
        terms, kl = {"actor_loss": temperature * nats - worth}, nats - n * log_uniform(self.spec)
        if self.dial.learned:
            excess = n * self.dial.slope(kl / n)
            terms["temperature_loss"] = self.dial.log * excess
            torch.div(excess, unit, out=self.dial.log.grad)
        return Loss(terms, n, {"kl": kl, "temperature": torch.scalar_tensor(temperature * n)})

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for phase in self.needs.groups:
            metrics |= step(batch, phase)
        follow(self.target, self.value or self.critic, self.config.tau)
        return metrics
