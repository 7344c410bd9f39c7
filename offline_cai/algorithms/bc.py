"""Behaviour cloning: the behaviour prior as a deterministic actor, mean squared error on the data's actions.

A tanh actor on normalised observations; the last iterate of BC jumps unless the learning rate decays to almost nothing,
so train it with a cosine schedule.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offline_cai.core import Algorithm, Batch, Chunks, Loss, Needs, Spec
from offline_cai.data.codec import Normaliser, NormaliserKind
from offline_cai.errors import UserError
from offline_cai.networks.mlp import mlp


@dataclass(frozen=True)
class BCConfig:
    """The actor."""

    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers."""
    normaliser: NormaliserKind = "gaussian"
    """gaussian (unit variance), limits (the range to [-1, 1]), quantile (flat on [-1, 1]) or none."""

    def __post_init__(self) -> None:
        if min(self.hidden, default=1) < 1:
            raise UserError(f"hidden is {self.hidden}; layers have at least one unit.")


class BC(Algorithm):
    Config = BCConfig
    config: BCConfig

    def __init__(self, spec: Spec, config: BCConfig) -> None:
        super().__init__(spec, config)
        self.normaliser = Normaliser(spec.obs_width, config.normaliser)
        self.actor = mlp(spec.obs_width, config.hidden, len(spec.box.low))

    @property
    def needs(self) -> Needs:
        return Needs()

    def fit(self, chunks: Chunks) -> None:
        self.normaliser.fit(chunk.obs for chunk in chunks())

    def act(self, obs: Tensor) -> Tensor:
        """Actions [B, A] in [-1, 1] for raw observations [B, O]."""
        return torch.tanh(self.actor(self.normaliser.encode(obs)))

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        step = batch.transition
        error = (self.act(step.obs) - self.spec.to_unit(step.action[:, 0])) ** 2
        return Loss({"loss": error.sum()}, error.numel())

    def policy(self, seed: int = 0, **options: Any) -> "BCPolicy":
        return BCPolicy(self)


class BCPolicy:
    """Acts by the actor alone; it remembers nothing and draws nothing."""

    def __init__(self, algorithm: BC) -> None:
        self._algorithm = algorithm

    def reset(self, done: np.ndarray | None = None) -> None:
        pass

    @torch.no_grad()
    def act(self, obs: np.ndarray) -> tuple[np.ndarray, None]:
        device = self._algorithm.normaliser.shift.device
        unit = self._algorithm.act(torch.as_tensor(obs, dtype=torch.float32, device=device))
        return self._algorithm.spec.to_raw(unit).cpu().numpy(), None
