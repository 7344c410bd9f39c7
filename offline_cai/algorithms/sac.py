"""Soft actor-critic: the posterior under a uniform prior, by reverse KL onto a squashed Gaussian (or a categorical).

Two forms. Haarnoja et al. 2018b (arXiv 1812.05905): twin critics that bootstrap from slow copies of themselves, and a
temperature that is found. Haarnoja et al. 2018a (arXiv 1801.01290): twin critics that bootstrap from a slow copy of a
separate V(s). Choices: Christodoulou 2019, with exact expectations in place of samples. All are one phase:
`training.clip` bounds the norm of all their gradients together.
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
from offline_cai.policies.distributions import Draw, log_uniform
from offline_cai.policies.networks import Actor, Critic, Value, follow, frozen, slow

NEXT, NOW = 0, 1  # streams of noise


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
        groups = {"all": ("value.", "critic.", "actor.", "dial.")}
        return Needs(discount=self.config.discount, source="replay", groups=groups)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """Losses of critics, actor, V and temperature, each by the others as they are, as in rlkit.

        Squared soft Bellman errors (2018a, equation 7; 2018b, equation 5); KL to exp(Q / temperature), times the
        temperature (2018b, equation 7); squared distance of V from the soft value (2018a, equation 5); the
        temperature's dual (2018b, equation 18).
        """
        step, (obs, action), temperature = batch.transition, self.now(batch), self.dial.temperature
        q, draw = self.critic(obs, action), self.actor(obs).draw(batch.key, stream=NOW)
        worth = self._soft(frozen(self.critic, obs, draw.action), draw)
        terms = {
            "critic_loss": 0.5 * (q - self.backup(step, self.after(step, batch.key))).square().sum(),
            "actor_loss": -worth.sum(),
        }
        if self.value is not None:
            terms["value_loss"] = 0.5 * (self.value(obs) - worth.detach()).square().sum()
        kl = draw.mean(draw.log_prob) - log_uniform(self.spec)
        if self.dial.learned:
            terms["temperature_loss"] = self.dial.loss(kl).sum()
        metrics = {"q": q.detach().mean(0).sum(), "kl": kl.detach().sum(), "temperature": temperature * len(obs)}
        return Loss(terms, len(obs), metrics)

    def _soft(self, q: Tensor, draw: Draw) -> Tensor:
        """E[min Q - temperature · log pi] [B], for Q [2, n, B] of the draws (2018b, equation 3)."""
        return draw.mean(q.amin(0) - self.dial.temperature * draw.log_prob)

    def backup(self, step: Transition, value: Tensor) -> Tensor:
        """What Q(s, a) should be [B]: r + discount · V(s'), for V(s') [B]."""
        return step.reward + self.config.discount * torch.where(step.terminal, 0.0, value)

    @torch.no_grad()
    def after(self, step: Transition, key: Tensor) -> Tensor:
        """V(s') [B], by the slow copy."""
        obs = self.normaliser.encode(step.next_obs)
        if not isinstance(self.target, Critic):
            return self.target(obs)
        draw = self.actor(obs).draw(key, stream=NEXT)
        return self._soft(self.target(obs, draw.action), draw)

    def by_hand(self, batch: Batch, phase: str, unit: int) -> Loss | None:
        if self.actor.choices:
            return None
        n, width, temperature = len(batch.key), self.spec.action_width, float(self.dial.temperature)
        both = self.normaliser.encode(batch.obs[:, :2]).transpose(0, 1).reshape(2 * n, -1)  # s, then s'
        asked, streams = (both, (NOW, NEXT)) if isinstance(self.target, Critic) else (both[:n], (NOW,))
        actor = by_hand.run(self.actor.body, asked)
        noise = torch.cat([seeding.normal(batch.key, (width,), stream, both.dtype) for stream in streams])
        draw = by_hand.squash(actor.out, noise)
        drawn = torch.cat([asked, draw.action], -1)
        if isinstance(self.target, Critic):
            value = torch.minimum(*(q(drawn[n:]) for q in self.target.each))[:, 0] - temperature * draw.log_prob[n:]
        else:
            value = self.target(both[n:])
        taken = torch.cat([both[:n], self.spec.to_unit(batch.action[:, 0, 0])], -1)
        critic_loss, q = by_hand.regress(self.critic.each, taken, self.backup(batch.transition, value), unit)
        draw, drawn = by_hand.Squashed(*(x[:n] for x in draw)), drawn[:n]
        one, two = (by_hand.run(q, drawn) for q in self.critic.each)
        least, slope = (one.out < two.out)[:, 0], torch.empty_like(draw.action)
        for critic, own in ((one, least), (two, ~least)):  # a sample goes back through the critic that says less, alone
            rows = own.nonzero()[:, 0]
            slope.index_copy_(0, rows, critic.to_input(-1 / unit, width, rows))
        actor.part(slice(n)).learn(draw.back(slope, temperature / unit))
        worth = torch.minimum(one.out, two.out)[:, 0].sub_(draw.log_prob, alpha=temperature)
        terms = {"critic_loss": critic_loss, "actor_loss": -worth.sum()}
        kl = draw.log_prob.sum() - n * log_uniform(self.spec)
        if self.value is not None:
            terms["value_loss"], _ = by_hand.regress([self.value.body], both[:n], worth, unit)
        if self.dial.learned:
            excess = n * self.dial.slope(kl / n)
            terms["temperature_loss"] = self.dial.log * excess
            torch.div(excess, unit, out=self.dial.log.grad)
        return Loss(terms, n, {"q": q.sum() / len(q), "kl": kl, "temperature": torch.scalar_tensor(temperature * n)})

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        metrics = step(batch)
        follow(self.target, self.value or self.critic, self.config.tau)
        return metrics
