"""Behaviour cloning: the behaviour prior itself, by regression on the data's actions or by likelihood.

With its defaults the actor is deterministic, tanh of a perceptron on normalised observations. The last iterate of BC
jumps unless the learning rate decays to almost nothing, so train it with a cosine schedule. A run of `family: squashed`
or `gaussian` has the actor that online algorithms have, which can start from it (`start_from`).
"""

from dataclasses import dataclass
from typing import Literal

from offline_cai.core import Batch, Discrete, Loss, Needs, Spec
from offline_cai.data.codec import NormaliserKind
from offline_cai.errors import UserError
from offline_cai.policies.acting import ActorAlgorithm
from offline_cai.policies.networks import Actor

WIDTH = 0.1
"""Standard deviation that the samples of a deterministic actor have; what it acts by is their mean."""


@dataclass(frozen=True)
class BCConfig:
    """The actor."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    family: Literal["deterministic", "gaussian", "squashed"] = "deterministic"
    """Of continuous actions: deterministic (squared error), or by likelihood a Gaussian (mean in the bounds, one
    standard deviation for each component) or a squashed one (both by state; actions at the very bounds weigh much)."""
    normaliser: NormaliserKind = "gaussian"
    """gaussian (unit variance), limits (the range to [-1, 1]), quantile (flat on [-1, 1]) or none."""

    def __post_init__(self) -> None:
        if min(self.hidden, default=1) < 1:
            raise UserError(f"hidden is {self.hidden}; layers have at least one unit.")


class BC(ActorAlgorithm):
    Config = BCConfig
    config: BCConfig

    def __init__(self, spec: Spec, config: BCConfig) -> None:
        super().__init__(spec, config, config.normaliser)
        if config.family == "deterministic":
            self.actor = Actor(spec, config.hidden, "gaussian", std=WIDTH)
            self.no_density = None if isinstance(spec.action, Discrete) else "it acts deterministically"
        else:
            self.actor = Actor(spec, config.hidden, config.family)

    @property
    def needs(self) -> Needs:
        return Needs()

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        step = batch.transition
        pi, action = self.actor(self.normaliser.encode(step.obs)), self.spec.to_unit(step.action[:, 0])
        if self.config.family == "deterministic" and not isinstance(self.spec.action, Discrete):
            error = (pi.mode - action) ** 2
            return Loss({"loss": error.sum()}, error.numel())
        return Loss({"loss": -pi.log_prob(action).sum()}, len(action))
