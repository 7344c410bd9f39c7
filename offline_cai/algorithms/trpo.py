"""Trust region policy optimisation: the posterior under the previous policy as prior, a KL budget away from it.

Schulman et al. 2015 (arXiv 1502.05477), appendix C: the natural gradient by conjugate gradients on products with the
Fisher matrix, and a line search that demands both the KL and an improvement. Constants as in sb3-contrib.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from offline_cai.core import Batch, Loss, Needs, Spec, Step
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.policies import dial, rollouts
from offline_cai.policies.acting import check_trace
from offline_cai.policies.networks import follow, slow
from offline_cai.policies.on_policy import OnPolicyAlgorithm


@dataclass(frozen=True)
class TRPOConfig:
    """Actor, baseline and trust region."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and baseline."""
    kl_budget: float = 0.01
    """Nats from the previous policy that an update may spend, as a mean over states."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    iterations: int = 15
    """Of conjugate gradients."""
    shrink: float = 0.8
    """Factor on the step for each trial of the line search but the first."""
    trials: int = 10
    """Of the line search; if none succeeds the policy stays."""
    discount: float = 0.99
    """Per step."""
    trace: float = 0.95
    """Lambda of the generalised advantages: 0 trusts the baseline, 1 the rewards."""
    standardise: bool = True
    """Whether advantages have mean 0 and variance 1 in each rollout."""
    value_epochs: int = 10
    """Passes over a rollout that fit the baseline."""
    minibatches: int = 16
    """Parts of a rollout in each of these passes, one step of the optimiser each."""

    def __post_init__(self) -> None:
        dial.check("auto", self.kl_budget)
        check_trace(self.discount, self.trace)
        if not self.damping > 0 or not 0 < self.shrink < 1:
            raise UserError("damping has to be positive, shrink between 0 and 1.")
        if min(self.iterations, self.trials, self.value_epochs, self.minibatches) < 1:
            raise UserError("iterations, trials, value_epochs and minibatches have to be at least 1.")


class TRPO(OnPolicyAlgorithm):
    """Its line search decides on the whole rollout and moves the actor itself: no optimiser, and one process only."""

    Config = TRPOConfig
    config: TRPOConfig

    def __init__(self, spec: Spec, config: TRPOConfig) -> None:
        super().__init__(spec, config)
        self.old = slow(self.actor)

    @property
    def needs(self) -> Needs:
        groups = {"value": ("value.",)}
        return Needs(discount=self.config.discount, source="rollout", groups=groups, one_process=True)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """The baseline's loss; `batch.returns` are its targets."""
        return self.baseline_loss(batch)

    def surrogate(self, steps: Batch) -> tuple[Tensor, Tensor]:
        """E[ratio · advantage] (equation 14) and KL(policy ‖ previous policy), means over n single steps.

        `steps.returns` are the advantages. The paper has the KL the other way round; the two agree to second order.
        """
        obs, action = self.now(steps)
        pi, old = self.actor(obs), self.old(obs)
        ratio = (pi.log_prob(action) - old.log_prob(action)).exp()
        return (ratio * steps.returns[:, 0]).mean(), pi.kl(old).mean()

    def fisher(self, steps: Batch) -> Callable[[Tensor], Tensor]:
        """v -> (F + damping) v, for the actor's parameters as one vector; F is the KL's second derivative."""
        parameters, obs = list(self.actor.parameters()), self.normaliser.encode(steps.obs[:, 0])
        pi = self.actor(obs)
        slope = torch.autograd.grad(pi.kl(pi.detach()).mean(), parameters, create_graph=True)
        flat = parameters_to_vector(slope)

        def product(v: Tensor) -> Tensor:
            image = torch.autograd.grad(flat, parameters, v, retain_graph=True)
            return parameters_to_vector(image) + self.config.damping * v

        return product

    def natural_step(self, steps: Batch) -> dict[str, float]:
        """Move the actor along the natural gradient, as far as the budget allows and the surrogate improves."""
        c, parameters = self.config, list(self.actor.parameters())
        before, (start, _) = parameters_to_vector(parameters).detach(), self.surrogate(steps)
        gradient = parameters_to_vector(torch.autograd.grad(start, parameters))
        begun, product = float(start.detach()), self.fisher(steps)
        direction = soft.conjugate_gradient(product, gradient, c.iterations)
        bend = float(direction @ product(direction))
        longest = math.sqrt(2 * c.kl_budget / bend) if bend > 0 else 0.0
        for trial in range(c.trials):
            vector_to_parameters(before + longest * c.shrink**trial * direction, parameters)
            with torch.no_grad():
                gain, kl = (float(x) for x in self.surrogate(steps))
            if kl < c.kl_budget and gain > begun:
                return {"gain": gain - begun, "kl": kl, "trials": trial + 1.0}
        vector_to_parameters(before, parameters)
        return {"gain": 0.0, "kl": 0.0, "trials": float(c.trials)}

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        follow(self.old, self.actor, 1.0)
        advantage, target = self.estimates(batch, step)
        metrics = self.natural_step(rollouts.single_steps(batch, advantage))
        return metrics | self.fit_baseline(batch, target, self.config.value_epochs, step)
