"""Implicit Q-learning: the behaviour prior, tilted by a value that is never asked about actions out of the data.

Kostrikov, Nair and Levine 2021 (arXiv 2110.06169). V is an expectile of Q over the data's actions, Q bootstraps from V,
and the actor is AWR's projection with A = Q - V. As in CORL the Gaussian is not squashed, and weights end at 100.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from offline_cai.core import Batch, Chunks, Loss, Needs, Spec, Step
from offline_cai.data.codec import NormaliserKind
from offline_cai.errors import UserError
from offline_cai.policies import by_hand, dial
from offline_cai.policies.acting import OfflineActorAlgorithm, check_bootstrap
from offline_cai.policies.dial import Temperature
from offline_cai.policies.networks import LOG_STD, Actor, Critic, Value, follow, slow
from offline_cai.policies.projection import Projection, check_clip


@dataclass(frozen=True)
class IQLConfig:
    """Values, critics and actor."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of all networks."""
    expectile: float = 0.7
    """Of Q over the data's actions: 0.5 is their mean, towards 1 their maximum."""
    temperature: Temperature = "auto"
    """Reward per nat in the actor's weights (the paper's 1 / beta); auto: found so that `kl_budget` is met."""
    kl_budget: float | None = None
    """Nats between the weighted data and the data; null with temperature auto: 0.5."""
    clip: float | None = 100.0
    """The largest weight; null: none."""
    family: Literal["gaussian", "squashed"] = "gaussian"
    """The actor's, where actions are continuous."""
    discount: float = 0.99
    """Per step."""
    tau: float = 0.005
    """Share of the way that target critics move at each update."""
    normaliser: NormaliserKind = "gaussian"
    """Of observations."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        check_clip(self.clip)
        if not 0 < self.expectile < 1:
            raise UserError(f"expectile is {self.expectile}; it has to be between 0 and 1.")
        check_bootstrap(self.discount, self.tau)


class IQL(OfflineActorAlgorithm):
    Config = IQLConfig
    config: IQLConfig

    def __init__(self, spec: Spec, config: IQLConfig) -> None:
        super().__init__(spec, config, config.normaliser)
        self.actor = Actor(spec, config.hidden, config.family)
        self.value = Value(spec, config.hidden)
        self.critic = Critic(spec, config.hidden, count=2)
        self.target = slow(self.critic)
        self.projection = Projection(config.temperature, config.kl_budget, config.clip)

    @property
    def needs(self) -> Needs:
        groups = {"value": ("value.",), "critic": ("critic.",), "actor": ("actor.",)}
        return Needs(discount=self.config.discount, groups=groups)

    def fit(self, chunks: Chunks) -> None:
        super().fit(chunks)
        self.projection.begin(self.returns.scale[0])

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        return {"value": self._value, "critic": self._critic, "actor": self._actor}[phase](batch)

    def _value(self, batch: Batch) -> Loss:
        """The expectile of the target critics' minimum (equation 5), which is `batch.returns`."""
        error = batch.returns[:, 0] - self.value(self.normaliser.encode(batch.obs[:, 0]))
        return Loss({"value_loss": expectile_loss(error, self.config.expectile).sum()}, len(error))

    def _critic(self, batch: Batch) -> Loss:
        """Squared distance of Q from what it should be (equation 6), which is `batch.returns`."""
        q = self.critic(*self.now(batch))
        loss = 0.5 * (q - batch.returns[:, 0]).square().sum()
        return Loss({"critic_loss": loss}, len(batch.key), {"q": self.returns.decode(q.detach()).mean(0).sum()})

    def _actor(self, batch: Batch) -> Loss:
        """Weighted regression (equation 7); `batch.returns` are the advantages."""
        obs, action = self.now(batch)
        loss = self.projection.loss(self.actor(obs).log_prob(action), batch.returns[:, 0])
        return Loss({"actor_loss": loss}, len(obs))

    def least(self, batch: Batch) -> Tensor:
        """The target critics' minimum [B] for the data's actions, in units of the data's returns."""
        return self.target(*self.now(batch)).amin(0)

    @torch.no_grad()
    def backup(self, batch: Batch, q: Tensor) -> tuple[Tensor, Tensor]:
        """What Q(s, a) should be [B], r + discount · V(s') in units of the data's returns; and the advantages [B].

        Those are Q - V in units of reward, for `least` [B].
        """
        step = batch.transition
        value, after = self.value(self.normaliser.encode(batch.obs[:, :2])).unbind(1)
        later = torch.where(step.terminal, 0.0, self.returns.decode(after))
        wanted = self.returns.encode(step.reward + self.config.discount * later)
        return wanted, self.returns.scale * (q - value)

    @torch.no_grad()
    def by_hand(self, batch: Batch, phase: str, unit: int) -> Loss | None:
        if self.critic.choices or (phase == "actor" and self.actor.family != "gaussian"):
            return None
        n, given = len(batch.key), batch.returns[:, 0]
        if phase == "value":
            value = by_hand.run(self.value.body, self.normaliser.encode(batch.obs[:, 0]))
            error = given[:, None] - value.out
            weighed = torch.where(error < 0, 1 - self.config.expectile, self.config.expectile) * error
            value.learn(weighed * (-2 / unit))
            return Loss({"value_loss": (weighed * error).sum()}, n)
        obs, action = self.now(batch)
        if phase == "critic":
            loss, q = by_hand.regress(self.critic.each, torch.cat([obs, action], -1), given, unit)
            return Loss({"critic_loss": loss}, n, {"q": self.returns.decode(q).mean(0).sum()})
        actor, log_std = by_hand.run(self.actor.body, obs), self.actor.log_std
        bounded = log_std.clamp(*LOG_STD)
        mean, weight = actor.out.tanh(), self.projection.weights(given)
        z, share = (action - mean) / bounded.exp(), weight / -unit
        squared = z.square()
        actor.learn(share[:, None] * z / bounded.exp() * (1 - mean.square()))
        torch.mul(share @ (squared - 1), log_std == bounded, out=log_std.grad)
        log_prob = -(0.5 * squared + (bounded + 0.5 * math.log(2 * math.pi))).sum(-1)
        return Loss({"actor_loss": -(weight @ log_prob)}, n)

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        q = self.least(batch)
        metrics = step(batch._replace(returns=q[:, None]), "value")
        wanted, advantage = self.backup(batch, q)
        metrics |= step(batch._replace(returns=wanted[:, None]), "critic")
        metrics |= self.projection.measure(advantage, step)
        follow(self.target, self.critic, self.config.tau)
        return metrics | step(batch._replace(returns=advantage[:, None]), "actor")


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(error < 0)| · error², elementwise; least where v of error = x - v is that expectile of x."""
    return torch.where(error < 0, 1 - expectile, expectile) * error.square()
