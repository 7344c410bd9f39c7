"""Advantage-weighted regression: the behaviour in the data as prior, exp(advantage / temperature) as evidence.

Peng, Kumar, Zhang and Levine 2019 (arXiv 1910.00177). Two baselines make two posteriors:

- value, the paper's: A = R(lambda) - V(s). Each state asks which of the actions tried *there* did better than usual.
- mean, which is not in the paper and learns no value: the posterior over whole episodes, p(tau | O) ∝ p(tau)
  exp(R(tau) / temperature), and the actor is behaviour cloning under it: episodes are drawn in proportion to their
  weight, which makes the mean return (or any constant) a baseline that cancels. Where dynamics are deterministic and
  the behaviour is one policy, this is the exact posterior policy for rewards that are not discounted. Where several
  policies made the data, which of them acts is a hidden part of the behaviour: the whole episode's return says much
  about it, and a V(s) takes just that out of the advantage, because states tell policies apart; what is left is mostly
  noise. Under chance it seeks risk: it also conditions chance on success.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from offline_cai.core import Batch, Chunks, Loss, Needs, Spec, Step
from offline_cai.data.codec import NormaliserKind
from offline_cai.data.sampling import return_weights_for_kl
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.policies import dial
from offline_cai.policies.acting import OfflineActorAlgorithm, check_trace
from offline_cai.policies.dial import Temperature
from offline_cai.policies.networks import Actor, Value
from offline_cai.policies.projection import Projection, check_clip

EPISODE_BUDGET = 1.0  # nats


@dataclass(frozen=True)
class AWRConfig:
    """Evidence and actor."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and value."""
    baseline: Literal["value", "mean"] = "value"
    """What a return is compared with: V(s), or the mean return of all episodes (whole episodes are weighed then)."""
    temperature: Temperature = "auto"
    """Reward per nat (with `normalise`: standard deviations of the advantage per nat); auto: `kl_budget` is met."""
    kl_budget: float | None = None
    """Nats between the weighted data and the data; with baseline mean: between episodes. Null with temperature auto:
    0.5, and 1 between episodes."""
    trace: float = 0.95
    """lambda of TD(lambda); 1: the data's own discounted return-to-go, to which an episode's cut is an end."""
    horizon: int = 16
    """Rows of the windows that TD(lambda) returns are made from, each of them a sample; 1 where trace is 1."""
    clip: float | None = 20.0
    """The largest weight, with baseline value; null: none."""
    normalise: bool = False
    """Standardise advantages over the batch."""
    family: Literal["gaussian", "squashed"] = "gaussian"
    """The actor's, where actions are continuous."""
    std: float | None = 0.2
    """Standard deviation of the Gaussian's components in [-1, 1]; null: learned."""
    discount: float = 0.99
    """Per step, with baseline value."""
    normaliser: NormaliserKind = "gaussian"
    """Of observations."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        check_trace(self.discount, self.trace)
        check_clip(self.clip)
        if self.horizon < 1 or (self.std is not None and not self.std > 0):
            raise UserError("horizon has to be at least 1, and std positive, or null to learn it.")


class AWR(OfflineActorAlgorithm):
    Config = AWRConfig
    config: AWRConfig

    def __init__(self, spec: Spec, config: AWRConfig) -> None:
        super().__init__(spec, config, config.normaliser)
        self.actor = Actor(spec, config.hidden, config.family, config.std)
        if config.baseline == "value":
            self.value = Value(spec, config.hidden)
            self.projection = Projection(config.temperature, config.kl_budget, config.clip, config.normalise)

    @property
    def needs(self) -> Needs:
        c = self.config
        if c.baseline == "mean":
            return Needs(groups={"actor": ("actor.",)}, weigh=self.weigh)
        groups = {"value": ("value.",), "actor": ("actor.",)}
        return Needs(horizon=1 if c.trace == 1 else c.horizon, discount=c.discount, groups=groups)

    def weigh(self, returns: np.ndarray) -> np.ndarray:
        """Weights [E] of episodes for their returns [E], normalised."""
        c = self.config
        if c.temperature == "auto":
            return return_weights_for_kl(returns, c.kl_budget or EPISODE_BUDGET)
        return soft.posterior_weights(torch.from_numpy(returns), c.temperature, dim=0).numpy()

    def fit(self, chunks: Chunks) -> None:
        super().fit(chunks)
        if self.config.baseline == "value":
            self.projection.begin(self.returns.scale[0])

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        return self._value(batch) if phase == "value" else self._actor(batch)

    def _value(self, batch: Batch) -> Loss:
        """Squared error to the TD(lambda) returns (algorithm 1, line 5)."""
        valid = batch.valid
        error = self.value(self.normaliser.encode(batch.obs[:, :-1])) - self.returns.encode(self.targets(batch))
        return Loss({"value_loss": 0.5 * error[valid].square().sum()}, valid.sum())

    def _actor(self, batch: Batch) -> Loss:
        """Weighted regression (algorithm 1, line 6)."""
        valid = batch.valid
        obs, action = self.normaliser.encode(batch.obs[:, :-1][valid]), self.spec.to_unit(batch.action[:, :, 0][valid])
        log_prob = self.actor(obs).log_prob(action)
        if self.config.baseline == "mean":
            return Loss({"actor_loss": -log_prob.sum()}, valid.sum())
        advantage = self.advantage(batch)
        loss = self.projection.loss(log_prob, advantage)
        return Loss({"actor_loss": loss}, valid.sum(), self.projection.tally(advantage))

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """TD(lambda) returns [B, H], in units of reward; V is zero at true ends alone."""
        c = self.config
        if c.trace == 1:
            return batch.returns
        value = self.returns.decode(self.value(self.normaliser.encode(batch.obs)))
        return soft.td_lambda(batch.reward, value, batch.terminal, c.discount, c.trace, batch.valid)

    @torch.no_grad()
    def advantage(self, batch: Batch) -> Tensor:
        """Of the rows that are valid [n], in units of reward."""
        value = self.returns.decode(self.value(self.normaliser.encode(batch.obs[:, :-1])))
        return (self.targets(batch) - value)[batch.valid]

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        if self.config.baseline == "mean":
            return step(batch, "actor")
        metrics = step(batch, "value")
        if self.config.normalise:
            self.projection.standardise(self.advantage(batch), step)
        return metrics | self.projection.settle(step(batch, "actor"))
