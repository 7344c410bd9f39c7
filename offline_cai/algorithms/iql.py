"""Implicit Q-learning: the behaviour prior, tilted by a value that is never asked about actions out of the data.

Kostrikov, Nair and Levine 2021 (arXiv 2110.06169). V is an expectile of Q over the data's actions, Q bootstraps from V,
and the actor is AWR's projection with A = Q - V. As in CORL the Gaussian is not squashed, and weights end at 100. The
three are one phase: `training.clip` bounds the norm of all their gradients together.
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
        return Needs(discount=self.config.discount, groups={"all": ("value.", "critic.", "actor.")})

    def fit(self, chunks: Chunks) -> None:
        super().fit(chunks)
        self.projection.begin(self.returns.scale[0])

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """V (equation 5), Q (6) and the actor (7), each by the others as they are, as in CORL."""
        obs, action = self.now(batch)
        q, log_prob = self.critic(obs, action), self.actor(obs).log_prob(action)
        error = self.least(obs, action) - self.value(obs)
        advantage = self.advantage(error.detach())
        terms = {
            "value_loss": expectile_loss(error, self.config.expectile).sum(),
            "critic_loss": 0.5 * (q - self.backup(batch)).square().sum(),
            "actor_loss": self.projection.loss(log_prob, advantage),
        }
        return Loss(terms, len(obs), self._metrics(q.detach(), advantage))

    def _metrics(self, q: Tensor, advantage: Tensor) -> dict[str, Tensor]:
        return {"q": self.returns.decode(q).mean(0).sum(), **self.projection.tally(advantage)}

    @torch.no_grad()
    def least(self, obs: Tensor, action: Tensor) -> Tensor:
        """The target critics' minimum [B] at normalised observations, in units of the data's returns."""
        return self.target(obs, action).amin(0)

    @torch.no_grad()
    def backup(self, batch: Batch) -> Tensor:
        """What Q(s, a) should be [B], r + discount · V(s'), in units of the data's returns."""
        step = batch.transition
        later = self.returns.decode(self.value(self.normaliser.encode(step.next_obs)))
        return self.returns.encode(step.reward + self.config.discount * torch.where(step.terminal, 0.0, later))

    def advantage(self, error: Tensor) -> Tensor:
        """Q - V [B] in units of reward, from its value in units of the data's returns."""
        return self.returns.scale * error

    def by_hand(self, batch: Batch, phase: str, unit: int) -> Loss | None:
        if self.critic.choices or self.actor.family != "gaussian":
            return None
        obs, action = self.now(batch)
        value = by_hand.run(self.value.body, obs)
        error = self.least(obs, action)[:, None] - value.out
        weighed = torch.where(error < 0, 1 - self.config.expectile, self.config.expectile) * error
        value.learn(weighed * (-2 / unit))
        both, wanted = torch.cat([obs, action], -1), self.backup(batch)
        critic_loss, q = by_hand.regress(self.critic.each, both, wanted, unit)
        advantage, log_std = self.advantage(error[:, 0]), self.actor.log_std
        weight, bounded = self.projection.weights(advantage), log_std.clamp(*LOG_STD)
        actor = by_hand.run(self.actor.body, obs)
        mean, std = actor.out.tanh(), bounded.exp()
        z, share = (action - mean) / std, weight / -unit
        squared = z.square()
        actor.learn(share[:, None] * z / std * (1 - mean.square()))
        torch.mul(share @ (squared - 1), log_std == bounded, out=log_std.grad)
        log_prob = -(0.5 * squared + (bounded + 0.5 * math.log(2 * math.pi))).sum(-1)
        terms = {
            "value_loss": (weighed * error).sum(),
            "critic_loss": critic_loss,
            "actor_loss": -(weight @ log_prob),
        }
        return Loss(terms, len(obs), self._metrics(q, advantage))

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        metrics = self.projection.settle(step(batch))
        follow(self.target, self.critic, self.config.tau)
        return metrics


def expectile_loss(error: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(error < 0)| · error², elementwise; least where v of error = x - v is that expectile of x."""
    return torch.where(error < 0, 1 - expectile, expectile) * error.square()
