"""Proximal policy optimisation with a KL penalty: the posterior under the previous policy as prior, by reverse KL.

Schulman et al. 2017 (arXiv 1707.06347), section 4, with KL(policy ‖ previous policy), so that the optimum of a step is
the posterior: previous policy × exp(advantage / temperature). Clipping (section 3) is an option.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from offline_cai.core import Batch, Loss, Needs, Spec, Step
from offline_cai.errors import UserError
from offline_cai.policies import dial, rollouts
from offline_cai.policies.acting import check_trace
from offline_cai.policies.dial import Dial, Temperature
from offline_cai.policies.networks import follow, slow
from offline_cai.policies.on_policy import OnPolicyAlgorithm

BAND = 1.5  # the KL may be that factor off its budget: beyond, epochs stop and the temperature moves
REACH = math.log(1e6)  # of the temperature's logarithm: if one pass alone spends too much, no temperature will do


@dataclass(frozen=True)
class PPOKLConfig:
    """Actor, baseline, penalty, and how often a rollout is used."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and baseline."""
    temperature: Temperature = "auto"
    """Advantage per nat from the previous policy, the weight of the KL; auto: adapted so that the KL is near
    `kl_budget`. In units of the advantages' spread if they are standardised."""
    kl_budget: float | None = None
    """Nats from the previous policy that an update spends, as a mean over states; null with temperature auto: 0.01."""
    ratio_clip: float | None = None
    """Probability ratios gain nothing beyond 1 ± this; null: no clipping."""
    epochs: int = 10
    """Passes over a rollout at most; with a budget they end when the KL is 1.5 times as much."""
    minibatches: int = 16
    """Parts of a rollout in each pass, one step of the optimiser each."""
    discount: float = 0.99
    """Per step."""
    trace: float = 0.95
    """Lambda of the generalised advantages: 0 trusts the baseline, 1 the rewards."""
    standardise: bool = True
    """Whether advantages have mean 0 and variance 1 in each rollout."""

    def __post_init__(self) -> None:
        dial.check(self.temperature, self.kl_budget)
        if self.ratio_clip is not None and not 0 < self.ratio_clip < 1:
            raise UserError(f"ratio_clip is {self.ratio_clip}; it has to be between 0 and 1, or null for no clipping.")
        check_trace(self.discount, self.trace)
        if min(self.epochs, self.minibatches) < 1:
            raise UserError("epochs and minibatches have to be at least 1.")


class PPOKL(OnPolicyAlgorithm):
    Config = PPOKLConfig
    config: PPOKLConfig

    def __init__(self, spec: Spec, config: PPOKLConfig) -> None:
        super().__init__(spec, config)
        self.old = slow(self.actor)
        self.dial = Dial(config.temperature, config.kl_budget, 0.01)

    @property
    def needs(self) -> Needs:
        groups = {"actor": ("actor.",), "value": ("value.",)}
        return Needs(discount=self.config.discount, source="rollout", groups=groups)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """`batch.returns` are what the phase needs: advantages for the actor, targets for the baseline."""
        return self.baseline_loss(batch) if phase == "value" else self._actor(batch)

    def _actor(self, batch: Batch) -> Loss:
        """-(ratio · advantage - temperature · KL) (equation 8), the ratio clipped if asked for (equation 7)."""
        obs, action = self.now(batch)
        pi, old, advantage = self.actor(obs), self.old(obs), batch.returns[:, 0]
        ratio = (pi.log_prob(action) - old.log_prob(action)).exp()
        gain, clip = ratio * advantage, self.config.ratio_clip
        if clip is not None:
            gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage)
        loss = self.dial.temperature * pi.kl(old) - gain
        return Loss({"actor_loss": loss.sum()}, len(loss))

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        c, budget = self.config, self.dial.budget or math.inf
        follow(self.old, self.actor, 1.0)
        advantage, target = self.estimates(batch, step)
        steps = rollouts.single_steps(batch, advantage)
        metrics: dict[str, float] = {}
        for epoch in range(c.epochs):
            for part in rollouts.minibatches(steps, c.minibatches, epoch, step.sum):
                metrics |= step(part, "actor")
            kl = float(self._kl(batch, step))
            if kl > BAND * budget:
                break
        metrics |= self.fit_baseline(batch, target, c.epochs, step)
        if self.dial.learned:
            self._adapt(kl / budget)
        return metrics | {"kl": kl, "temperature": float(self.dial.temperature), "epochs": epoch + 1.0}

    @torch.no_grad()
    def _kl(self, batch: Batch, step: Step) -> Tensor:
        """KL(policy ‖ previous policy), the mean over all steps of all processes."""
        obs = self.normaliser.encode(batch.obs[:, :-1])
        return rollouts.mean(self.actor(obs).kl(self.old(obs)), batch.valid, step.sum)

    @torch.no_grad()
    def _adapt(self, spent: float) -> None:
        """Twice the temperature where too much of the budget was spent, half of it where too little (section 4)."""
        self.dial.log.add_(math.log(2) * ((spent > BAND) - (spent < 1 / BAND))).clamp_(-REACH, REACH)
