"""Maximum-entropy policy gradient: the posterior under a uniform prior, by reverse KL through the score function.

Levine 2018 (arXiv 1805.00909), section 4.1: the reward of a step is r - temperature · log q(a | s), and the gradient
weighs the score of an action by all that follows it. Baseline and generalised advantages: Schulman et al. 2016.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from offline_cai.core import Batch, Loss, Needs, Spec, Step
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.policies import dial, rollouts
from offline_cai.policies.acting import ActorAlgorithm
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.distributions import log_uniform
from offline_cai.policies.networks import Actor, ScaledValue


@dataclass(frozen=True)
class MaxEntPGConfig:
    """Actor, baseline and temperature."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and baseline."""
    temperature: Temperature = "auto"
    """Reward per nat of entropy; auto: found so that the KL from the uniform prior meets `kl_budget`."""
    kl_budget: float | None = None
    """Nats from the uniform prior; null with temperature auto: an entropy of -1 nat per action component."""
    discount: float = 0.99
    """Per step."""
    trace: float = 0.95
    """Lambda of the generalised advantages: 0 trusts the baseline, 1 the rewards."""
    standardise: bool = True
    """Whether advantages have mean 0 and variance 1 in each rollout."""
    value_epochs: int = 5
    """Passes over a rollout that fit the baseline."""
    minibatches: int = 8
    """Parts of a rollout in each of these passes, one step of the optimiser each."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        if not 0 <= self.discount <= 1 or not 0 <= self.trace <= 1:
            raise UserError("discount and trace have to be in [0, 1].")
        if min(self.value_epochs, self.minibatches) < 1:
            raise UserError("value_epochs and minibatches have to be at least 1.")


class MaxEntPG(ActorAlgorithm):
    Config = MaxEntPGConfig
    config: MaxEntPGConfig

    def __init__(self, spec: Spec, config: MaxEntPGConfig) -> None:
        super().__init__(spec, config, "none")
        self.actor = Actor(spec, config.hidden)
        self.value = ScaledValue(spec, config.hidden)
        auto = spec.action_width - log_uniform(spec)  # an entropy of -|A| is that far from uniform
        self.dial = Dial(config.temperature, config.kl_budget, auto)

    @property
    def needs(self) -> Needs:
        groups = {"actor": ("actor.", "dial.") if self.dial.learned else ("actor.",), "value": ("value.",)}
        return Needs(discount=self.config.discount, source="rollout", groups=groups)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """`batch.returns` are what the phase needs: advantages for the actor, targets for the baseline."""
        return self._value(batch) if phase == "value" else self._actor(batch)

    def _actor(self, batch: Batch) -> Loss:
        """The score of each action times its advantage, and the temperature's dual."""
        log_q = self.actor(self.normaliser.encode(batch.obs[:, 0])).log_prob(self.spec.to_unit(batch.action[:, 0, 0]))
        terms = {"actor_loss": -(log_q * batch.returns[:, 0]).sum()}
        kl = log_q.detach() - log_uniform(self.spec)
        if self.dial.learned:
            terms["temperature_loss"] = self.dial.loss(kl).sum()
        return Loss(terms, len(kl), {"kl": kl.sum(), "temperature": self.dial.temperature * len(kl)})

    def _value(self, batch: Batch) -> Loss:
        error = self.value(self.normaliser.encode(batch.obs[:, 0])) - batch.returns[:, 0]
        return Loss({"value_loss": 0.5 * (error / self.value.scale).square().sum()}, len(error))

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        """One step of the actor, then the baseline on what it missed."""
        c = self.config
        advantage, target = self.advantages(batch)
        if c.standardise:
            advantage = rollouts.standardised(advantage, batch.valid, step.sum)
        metrics = step(rollouts.single_steps(batch, advantage), "actor")
        self.value.rescale(rollouts.mean(target.square(), batch.valid, step.sum).sqrt())
        targets = rollouts.single_steps(batch, target)
        for epoch in range(c.value_epochs):
            for part in rollouts.minibatches(targets, c.minibatches, epoch, step.sum):
                metrics |= step(part, "value")
        return metrics

    @torch.no_grad()
    def advantages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Soft advantages and targets of the soft value [B, H] of a rollout."""
        obs = self.normaliser.encode(batch.obs)
        log_q = self.actor(obs[:, :-1]).log_prob(rollouts.unit_actions(self.spec, batch))
        reward, value = batch.reward - self.dial.temperature * log_q, self.value(obs)
        advantage = soft.gae(reward, value, batch.terminal, self.config.discount, self.config.trace, batch.valid)
        return advantage, advantage + value[:, :-1]
