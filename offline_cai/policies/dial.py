"""The one dial of all actors: a temperature, or the nats that the policy may be away from its prior."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from offline_cai.errors import UserError

Temperature = float | Literal["auto"]


def check(temperature: Temperature, kl_budget: float | None) -> None:
    """For a config's `__post_init__`.

    Raises:
        UserError: a temperature or a budget that is not positive, or both at once.
    """
    if temperature != "auto" and not 0 < temperature < math.inf:
        raise UserError(f"temperature is {temperature}; it has to be positive, or auto.")
    if kl_budget is not None and not 0 < kl_budget < math.inf:
        raise UserError(f"kl_budget is {kl_budget}; it has to be a positive number of nats, or null.")
    if kl_budget is not None and temperature != "auto":
        raise UserError("temperature and kl_budget are two ways to say the same: give one, with temperature: auto.")


REACH = math.log(1e5)
"""How far `steer` takes the logarithm of a temperature from where it began: a KL that no temperature mends, such as
that of a policy which does not follow its prior yet, would else take it out of sight."""


class Dial(nn.Module):
    """A fixed temperature, or one whose logarithm is learned so that the mean KL from the prior meets a budget.

    Args:
        temperature: in units of reward per nat, or auto: found for a budget.
        kl_budget: nats, or None: `auto_budget` if the temperature is auto.
        start: where a learned temperature begins.
    """

    began: Tensor  # [], the logarithm of the temperature at the beginning

    def __init__(
        self, temperature: Temperature, kl_budget: float | None, auto_budget: float, start: float = 1.0
    ) -> None:
        super().__init__()
        fixed = temperature != "auto"
        self.budget = None if fixed else (auto_budget if kl_budget is None else kl_budget)
        log = torch.tensor(math.log(temperature if isinstance(temperature, float | int) else start))
        self.log = nn.Parameter(log, requires_grad=not fixed)
        self.register_buffer("began", log.clone(), persistent=False)

    @torch.no_grad()
    def begin(self, temperature: Tensor) -> None:
        """Let a learned temperature begin at that one []."""
        if self.learned:
            self.log.copy_(temperature.log())
            self.began.copy_(self.log)

    @property
    def learned(self) -> bool:
        return self.budget is not None

    @property
    def temperature(self) -> Tensor:
        """A scalar without gradient."""
        return self.log.detach().exp()

    def steer(self, kl: float, rate: float = 0.02) -> None:
        """Move a learned temperature without an optimiser, for the KL of this update: it rests where KL is the budget.

        log temperature += rate · (KL / budget - 1), which is cut at 1; within REACH of where it began.
        """
        if self.budget is not None:
            with torch.no_grad():
                self.log.add_(rate * min(max(kl / self.budget - 1, -1.0), 1.0))
                self.log.clamp_(self.began - REACH, self.began + REACH)

    def loss(self, kl: Tensor) -> Tensor:
        """The dual [B] for the policy's KL from its prior [B] (or a sample's log-ratio): it rises while KL > budget.

        log temperature · (budget - KL), as SAC's implementations have it (Haarnoja et al. 2018b, equation 18, has the
        temperature for its logarithm).
        """
        return self.log * self.slope(kl)

    def slope(self, kl: Tensor) -> Tensor:
        """The gradient [B] of `loss` in log temperature."""
        assert self.budget is not None
        return self.budget - kl.detach()
