"""Weighted regression: the projection of prior × exp(advantage / temperature) onto an actor, from samples of the prior.

The samples are the data, so the prior is the behaviour in them. It is the M-step of AWR (Peng et al. 2019, equation 8)
and the extraction of IQL (Kostrikov et al. 2021, equation 7).
"""

import math

import torch
from torch import Tensor, nn

from offline_cai.core import Step
from offline_cai.errors import UserError
from offline_cai.inference import soft
from offline_cai.policies.dial import Dial, Temperature

LARGEST = 70.0  # nats either way: float32, from 1e-38 to 3e38, holds the sums of exp(nats) and of nats · exp(nats)
FAR = 58.0  # nats: a mean weight beyond exp(±FAR) has samples at LARGEST, or a hundred thousand of them nearly there


def check_clip(clip: float | None) -> None:
    """For a config's `__post_init__`.

    Raises:
        UserError: a largest weight that is not positive.
    """
    if clip is not None and not clip > 0:
        raise UserError(f"clip is {clip}; as the largest weight it has to be positive, or null for none.")


class Projection(nn.Module):
    """Weights of samples by their advantage, and the loss that they give an actor.

    A budget is spent over the data as a whole: the KL in nats of the weighted data from the data, not of an action's
    law in each state. `tally` counts it beside the loss, and `settle` moves a learned temperature after the step.

    Args:
        temperature: reward per nat, or auto; of standardised advantages it has no unit.
        kl_budget: nats, with temperature auto; None: 0.5.
        clip: the largest weight, None for no bound; then weights of more than 88 nats overflow in float32.
        normalise: whether advantages are standardised over the batch.
    """

    shift: Tensor  # []
    scale: Tensor  # []

    def __init__(
        self, temperature: Temperature, kl_budget: float | None, clip: float | None, normalise: bool = False
    ) -> None:
        super().__init__()
        self.dial = Dial(temperature, kl_budget, auto_budget=0.5)
        self.clip, self.normalise = clip, normalise
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def begin(self, spread: Tensor) -> None:
        """Let a learned temperature begin where advantages of that spread [] are of order one."""
        if not self.normalise:
            self.dial.begin(spread)

    @torch.no_grad()
    def standardise(self, advantage: Tensor, step: Step) -> None:
        """Take mean and spread of a batch's advantages [n], of which each process has its part, for its weights."""
        x = advantage.double()
        count, total, square = step.sum(torch.stack([x.new_full((), len(x)), x.sum(), x.square().sum()]))
        self.shift.copy_(total / count)
        self.scale.copy_((square / count - (total / count) ** 2).clamp(min=1e-12).sqrt())

    @torch.no_grad()
    def tally(self, advantage: Tensor) -> dict[str, Tensor]:
        """Sums over samples with these advantages [n], for a loss to report: what `settle` finds the KL by."""
        nats = self._nats(advantage.double()).clamp(-LARGEST, LARGEST)
        weight = nats.exp()
        return {"weight": weight.sum(), "tilted": weight @ nats}

    def settle(self, metrics: dict[str, float]) -> dict[str, float]:
        """A step's metrics with the KL that its weights had, in place of what was tallied, and the temperature.

        A learned temperature moves towards its budget; weights that are out of reach count as infinitely far. A step
        that was skipped may have tallied nothing.
        """
        weight, tilted = metrics.pop("weight", None), metrics.pop("tilted", None)
        if weight is not None and tilted is not None:
            if math.exp(-FAR) < weight < math.exp(FAR):
                metrics["kl"] = tilted / weight - math.log(weight)
            self.dial.steer(metrics.get("kl", math.inf))
        return metrics | {"temperature": float(self.dial.temperature)}

    def loss(self, log_prob: Tensor, advantage: Tensor) -> Tensor:
        """The sum over samples, for the log-probabilities [n] of the data's actions and their advantages [n]."""
        return -(self.weights(advantage.detach()) * log_prob).sum()

    def weights(self, advantage: Tensor) -> Tensor:
        """What samples [n] with these advantages [n] count."""
        return soft.posterior_weights(self._nats(advantage), clip=self.clip)

    def _nats(self, advantage: Tensor) -> Tensor:
        return (advantage - self.shift) / self.scale / self.dial.temperature
