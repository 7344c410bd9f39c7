"""Weighted regression: the projection of prior × exp(advantage / temperature) onto an actor, from samples of the prior.

The samples are the data, so the prior is the behaviour in them. It is the M-step of AWR (Peng et al. 2019, equation 8)
and the extraction of IQL (Kostrikov et al. 2021, equation 7).
"""

import torch
from torch import Tensor, nn

from offline_cai.core import Step
from offline_cai.inference import soft
from offline_cai.policies.dial import Dial, Temperature

LARGEST = 700.0  # nats: exp stays finite in float64


class Projection(nn.Module):
    """Weights of samples by their advantage, and the loss that they give an actor.

    What needs the whole batch (the advantages' mean and spread, and the mean of their exponentials) is measured before
    the loss, over all processes. A budget is spent over the data as a whole: the KL in nats of the weighted data from
    the data, not of an action's law in each state.

    Args:
        temperature: reward per nat, or auto; of standardised advantages it has no unit.
        kl_budget: nats, with temperature auto; None: 0.5.
        clip: the largest weight, None for no bound.
        normalise: whether advantages are standardised over the batch.
    """

    log_mean: Tensor  # [] log E exp(advantage / temperature)
    shift: Tensor  # []
    scale: Tensor  # []

    def __init__(
        self, temperature: Temperature, kl_budget: float | None, clip: float | None, normalise: bool = False
    ) -> None:
        super().__init__()
        self.dial = Dial(temperature, kl_budget, auto_budget=0.5)
        self.clip, self.normalise = clip, normalise
        self.register_buffer("log_mean", torch.zeros(()))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def begin(self, spread: Tensor) -> None:
        """Let a learned temperature begin where advantages of that spread [] are of order one."""
        if self.dial.learned and not self.normalise:
            with torch.no_grad():
                self.dial.log.copy_(spread.log())

    @torch.no_grad()
    def measure(self, advantage: Tensor, step: Step) -> None:
        """Take the statistics of a batch's advantages [n], of which each process has its part."""
        x = advantage.double()
        if self.normalise:
            count, total, square = step.sum(torch.stack([torch.ones_like(x).sum(), x.sum(), x.square().sum()]))
            self.shift.copy_(total / count)
            self.scale.copy_((square / count - (total / count) ** 2).clamp(min=1e-12).sqrt())
        nats = ((x - self.shift) / self.scale / self.dial.temperature).clamp(max=LARGEST)
        count, total = step.sum(torch.stack([torch.ones_like(x).sum(), nats.exp().sum()]))
        self.log_mean.copy_((total / count).log())

    def loss(self, log_prob: Tensor, advantage: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms and metrics, as sums, for the log-probabilities [n] of the data's actions and their advantages [n]."""
        nats = (advantage.detach() - self.shift) / self.scale / self.dial.temperature
        terms = {"actor_loss": -(soft.posterior_weights(nats, clip=self.clip) * log_prob).sum()}
        log_ratio = (nats - self.log_mean).clamp(max=80.0)  # of posterior and data, as log_mean was measured
        kl = log_ratio.exp() * log_ratio
        if self.dial.learned:
            terms["temperature_loss"] = self.dial.loss(kl).sum()
        return terms, {"kl": kl.sum(), "temperature": self.dial.temperature * len(advantage)}
