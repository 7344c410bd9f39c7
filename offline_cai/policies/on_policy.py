"""What algorithms that learn from their own rollouts have in common: an actor, and a baseline for its advantages."""

from typing import Any

import torch
from torch import Tensor

from offline_cai.core import Batch, Loss, Spec, Step
from offline_cai.inference import soft
from offline_cai.policies import rollouts
from offline_cai.policies.acting import ActorAlgorithm
from offline_cai.policies.networks import Actor, ScaledValue


class OnPolicyAlgorithm(ActorAlgorithm):
    """One whose update improves `actor` by a rollout's advantages, and fits the baseline V(s) = `value` in phase value.

    Its config has `hidden`, `discount`, `trace`, `standardise` and `minibatches`.
    """

    def __init__(self, spec: Spec, config: Any) -> None:
        super().__init__(spec, config, "none")
        self.actor = Actor(spec, config.hidden)
        self.value = ScaledValue(spec, config.hidden)

    def rewards(self, batch: Batch) -> Tensor:
        """What is maximised at each step [B, H]."""
        return batch.reward

    @torch.no_grad()
    def advantages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Generalised advantages (Schulman et al. 2016, equation 16) and the baseline's targets, [B, H] each."""
        c, value = self.config, self.value(self.normaliser.encode(batch.obs))
        advantage = soft.gae(self.rewards(batch), value, batch.terminal, c.discount, c.trace, batch.valid)
        return advantage, advantage + value[:, :-1]

    def estimates(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """`advantages`, of which the first are standardised over all processes if the config says so."""
        advantage, target = self.advantages(batch)
        if self.config.standardise:
            advantage = rollouts.standardised(advantage, batch.valid, step.sum)
        return advantage, target

    def baseline_loss(self, steps: Batch) -> Loss:
        """Squared error to `returns`, the targets of single steps, in units of the baseline's scale."""
        error = self.value(self.normaliser.encode(steps.obs[:, 0])) - steps.returns[:, 0]
        return Loss({"value_loss": 0.5 * (error / self.value.scale).square().sum()}, len(error))

    def fit_baseline(self, batch: Batch, target: Tensor, epochs: int, step: Step) -> dict[str, float]:
        """That many passes over a rollout with targets [B, H], which also set the baseline's scale."""
        self.value.rescale(rollouts.mean(target.square(), batch.valid, step.sum).sqrt())
        steps = rollouts.single_steps(batch, target)
        metrics: dict[str, float] = {}
        for epoch in range(epochs):
            for part in rollouts.minibatches(steps, self.config.minibatches, epoch, step.sum):
                metrics |= step(part, "value")
        return metrics
