"""Maximum-entropy policy gradient: the posterior under a uniform prior, by reverse KL through the score function.

Levine 2018 (arXiv 1805.00909), section 4.1: the reward of a step is r - temperature · log q(a | s), and the gradient
weighs the score of an action by all that follows it. Baseline and generalised advantages: Schulman et al. 2016.
"""

from dataclasses import dataclass

from torch import Tensor

from offline_cai.core import Batch, Loss, Needs, Spec, Step
from offline_cai.errors import UserError
from offline_cai.policies import dial, rollouts
from offline_cai.policies.acting import check_trace
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.distributions import log_uniform
from offline_cai.policies.on_policy import OnPolicyAlgorithm


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
        check_trace(self.discount, self.trace)
        if min(self.value_epochs, self.minibatches) < 1:
            raise UserError("value_epochs and minibatches have to be at least 1.")


class MaxEntPG(OnPolicyAlgorithm):
    Config = MaxEntPGConfig
    config: MaxEntPGConfig

    def __init__(self, spec: Spec, config: MaxEntPGConfig) -> None:
        super().__init__(spec, config)
        auto = spec.action_width - log_uniform(spec)  # an entropy of -|A| is that far from uniform
        self.dial = Dial(config.temperature, config.kl_budget, auto)

    @property
    def needs(self) -> Needs:
        groups = {"actor": ("actor.", "dial.") if self.dial.learned else ("actor.",), "value": ("value.",)}
        return Needs(discount=self.config.discount, source="rollout", groups=groups)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """`batch.returns` are what the phase needs: advantages for the actor, targets for the baseline."""
        return self.baseline_loss(batch) if phase == "value" else self._actor(batch)

    def _actor(self, batch: Batch) -> Loss:
        """The score of each action times its advantage, and the temperature's dual."""
        obs, action = self.now(batch)
        log_q = self.actor(obs).log_prob(action)
        terms = {"actor_loss": -(log_q * batch.returns[:, 0]).sum()}
        kl = log_q.detach() - log_uniform(self.spec)
        if self.dial.learned:
            terms["temperature_loss"] = self.dial.loss(kl).sum()
        return Loss(terms, len(kl), {"kl": kl.sum(), "temperature": self.dial.temperature * len(kl)})

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        """One step of the actor, then the baseline on what it missed."""
        advantage, target = self.estimates(batch, step)
        metrics = step(rollouts.single_steps(batch, advantage), "actor")
        return metrics | self.fit_baseline(batch, target, self.config.value_epochs, step)

    def rewards(self, batch: Batch) -> Tensor:
        """r - temperature · log q(a | s), so that advantages and values are soft."""
        pi = self.actor(self.normaliser.encode(batch.obs[:, :-1]))
        return batch.reward - self.dial.temperature * pi.log_prob(rollouts.unit_actions(self.spec, batch))
