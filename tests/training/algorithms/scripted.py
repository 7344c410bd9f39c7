"""A learner whose every update is a plain function of its batch, to see what sources give: linear in everything."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Batch, Chunks, Explorer, Loss, Needs, Spec
from offline_cai.policies.acting import ActorPolicy
from offline_cai.policies.distributions import Gaussian

STD = 0.3


@dataclass(frozen=True)
class ScriptedConfig:
    """What it asks for."""

    source: Literal["replay", "rollout"] = "replay"
    """Where batches come from."""
    horizon: int = 2
    """Blocks of a window of a replay."""


class Scripted(Explorer):
    Config = ScriptedConfig
    config: ScriptedConfig

    def __init__(self, spec: Spec, config: ScriptedConfig) -> None:
        super().__init__(spec, config)
        self.weight = torch.nn.Parameter(torch.randn(spec.obs_width, spec.action_width) * 0.1)

    @property
    def needs(self) -> Needs:
        return Needs(horizon=self.config.horizon, source=self.config.source)

    def fit(self, chunks: Chunks) -> None:
        pass

    def mean(self, obs: Tensor) -> Tensor:
        """Of the action in [-1, 1]; each row is computed alone, bit for bit."""
        return torch.tanh((obs.float().clamp(-10, 10)[..., None] * self.weight).sum(-2))

    def explore(self, obs: np.ndarray, key: Tensor) -> tuple[np.ndarray, np.ndarray]:
        mean = self.mean(torch.from_numpy(obs))
        unit = mean + STD * seeding.normal(key, (mean.shape[1],))
        return self.spec.to_raw(unit.double()).numpy(), self.log_prob(mean, unit).numpy()

    def log_prob(self, mean: Tensor, unit: Tensor) -> Tensor:
        return (-0.5 * ((unit - mean) / STD) ** 2).sum(-1)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """Towards actions that were rewarded, and a little noise from the batch's keys."""
        unit = self.spec.to_unit(batch.action[:, :, 0])
        noise = seeding.normal(batch.key, unit.shape[1:], dtype=unit.dtype)
        error = (self.mean(batch.obs[:, :-1]) - unit + 0.1 * noise).square().sum(-1) * batch.reward.exp().clamp(max=2)
        return Loss({"loss": (error * batch.valid).sum()}, batch.valid.sum())

    def pi(self, obs: np.ndarray) -> Gaussian:
        mean = self.mean(torch.from_numpy(obs))
        return Gaussian(mean, torch.full_like(mean, STD))

    def policy(self, seed: int = 0, **options: Any) -> ActorPolicy:
        return ActorPolicy(self.spec, self.pi, seed)
