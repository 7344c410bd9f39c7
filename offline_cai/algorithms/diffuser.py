"""Diffuser (Janner, Du, Tenenbaum and Levine 2022): planning by sampling from a diffusion over whole trajectories.

Prior: p(tau), the density of the data's windows. Known states are imposed at every level, in training as in sampling.
The paper's maze recipe is horizon 128, stride 1, multipliers 1-4-8, 64 levels, actions in the rows; the defaults here
are fewer, longer steps, which learn the same mazes in a fraction of the time.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Algorithm, Batch, Chunks, Known, Loss, Needs, Plan, Spec
from offline_cai.data.codec import Codec, NormaliserKind
from offline_cai.diffusion.sampler import ddim, ddpm
from offline_cai.diffusion.schedule import Schedule, ScheduleKind
from offline_cai.errors import UserError
from offline_cai.networks.temporal_unet import TemporalUNet
from offline_cai.planning.planner import Planner
from offline_cai.planning.tracking import Tracker


@dataclass(frozen=True)
class PlannerConfig:
    """How plans are sampled and executed."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    """The sampler of the reverse process."""
    steps: int = 2
    """Denoising steps of ddim; ddpm takes all levels."""
    execute: Literal["track", "actions"] = "track"
    """Follow the planned states with the tracker, or play the planned actions."""
    replan: int | None = None
    """Steps after which a new plan is made; null: one plan per episode."""
    tracker: Tracker = field(default_factory=Tracker)
    """Columns and gains of the PD controller."""

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.replan is not None and self.replan < 1):
            raise UserError(f"planner: steps ({self.steps}) and replan ({self.replan}) have to be at least 1.")


@dataclass(frozen=True)
class DiffuserConfig:
    """The trajectory model, its noise and its planner."""

    rows: int = 16
    """Rows of a plan: it spans rows x stride time steps."""
    stride: int = 8
    """Time steps from one row to the next."""
    fields: tuple[str, ...] = ("observation",)
    """Fields of the observation that make a row."""
    goal_field: str | None = "desired_goal"
    """Field of the observation that says where a plan should end; null: plans have no goal."""
    goal_columns: tuple[int, ...] = (0, 1)
    """Columns of the selected observation that the goal fixes in the last row."""
    actions: bool = False
    """Whether rows also hold the actions of their time steps (needed to execute a plan by its own actions)."""
    normaliser: NormaliserKind = "limits"
    """limits (the range to [-1, 1]), gaussian (unit variance), quantile (flat on [-1, 1]) or none."""
    channels: int = 32
    """Channels of the U-Net's first level, a multiple of 8."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each level of the U-Net, as multiples of the first."""
    levels: int = 64
    """Noise levels T of the diffusion."""
    schedule: ScheduleKind = "cosine"
    """How the noise grows with the level."""
    prediction: Literal["x_0", "epsilon"] = "x_0"
    """What the network predicts; the denoiser returns x_0 either way."""
    discount: float = 0.99
    """Discount of the returns in a batch, per time step."""
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    """How plans are sampled and executed."""

    def __post_init__(self) -> None:
        sizes = {"rows": self.rows, "stride": self.stride, "channels": self.channels, "levels": self.levels}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it has to be at least 1.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers are {list(self.multipliers)}; give one level or more, each at least 1.")
        if not 0 < self.discount <= 1:
            raise UserError(f"discount is {self.discount}; it has to be above 0 and at most 1.")
        if self.planner.steps > self.levels:
            raise UserError(f"planner.steps is {self.planner.steps}, more than the {self.levels} noise levels.")
        if self.planner.execute == "actions" and not self.actions:
            raise UserError("planner.execute is actions, but the rows hold none: set actions: true.")


class Diffuser(Algorithm):
    Config = DiffuserConfig
    config: DiffuserConfig

    def __init__(self, spec: Spec, config: DiffuserConfig) -> None:
        super().__init__(spec, config)
        c = config
        self.codec = Codec(spec, c.rows, c.stride, c.fields, c.actions, c.normaliser)
        self.network = TemporalUNet(self.codec.width, c.channels, c.multipliers)
        self.schedule = Schedule(c.levels, c.schedule)
        if c.rows < 2 or c.rows % self.network.divisor:
            raise UserError(
                f"model.rows is {c.rows}, but a U-Net of {len(c.multipliers)} levels needs a multiple of "
                f"{self.network.divisor}, and a plan needs two rows or more."
            )
        width = len(self.codec.columns)
        used = (*(c.goal_columns if c.goal_field else ()), *c.planner.tracker.columns)
        if c.planner.execute == "track" and not all(0 <= column < width for column in used):
            raise UserError(
                f"goal_columns and the tracker's columns are {list(used)}, but fields {list(c.fields)} make {width} "
                f"columns: take numbers from 0 to {width - 1}."
            )
        if c.goal_field and len(spec.columns(c.goal_field)) != len(c.goal_columns):
            raise UserError(
                f"model.goal_columns names {len(c.goal_columns)} columns, not the width of {c.goal_field!r}."
            )

    @property
    def needs(self) -> Needs:
        return Needs(horizon=self.config.rows, stride=self.config.stride, discount=self.config.discount)

    def fit(self, chunks: Chunks) -> None:
        self.codec.fit(chunks)

    # Loss ------------------------------------------------------------------------------------------------------------

    def denoise(self, x: Tensor, k: Tensor) -> Tensor:
        """D(x_k, k) -> x_0: rows [N, R, D], levels [N]."""
        output = self.network(x, k)
        return output if self.config.prediction == "x_0" else self.schedule.clean_from_noise(x, output, k)

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        """Squared error of the network's prediction over the rows that are not known (paper, appendix C)."""
        x = self.codec.encode(batch)
        known = Known(x, self._mask(x))
        k = seeding.integers(batch.key, self.config.levels, stream=0)
        noise = seeding.normal(batch.key, tuple(x.shape[1:]), stream=1)
        prediction = self.network(known.impose(self.schedule.add_noise(x, noise, k)), k)
        target = x if self.config.prediction == "x_0" else noise
        error = (prediction - target) ** 2 * ~known.mask
        return Loss({"loss": error.sum()}, (~known.mask).sum())

    def _mask(self, x: Tensor) -> Tensor:
        """The first row's state, and in the last row the goal's columns."""
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[:, 0, self.codec.actions :] = True
        if self.config.goal_field:
            mask[:, -1, [self.codec.actions + column for column in self.config.goal_columns]] = True
        return mask

    # Plans -----------------------------------------------------------------------------------------------------------

    def known(self, obs: np.ndarray) -> Known:
        """The known rows for observations [N, O]: the state now, and the goal if the observation names one."""
        raw = torch.as_tensor(obs, dtype=torch.float32, device=self.schedule.abar.device)
        state = raw[:, self.codec.columns]
        rows = state[:, None].repeat(1, self.config.rows, 1)
        if self.config.goal_field:
            rows[:, -1, list(self.config.goal_columns)] = raw[:, self.spec.columns(self.config.goal_field)]
        value = self.codec.obs_norm.encode(rows)
        if self.codec.actions:
            value = torch.cat([value.new_zeros(*value.shape[:2], self.codec.actions), value], dim=-1)
        return Known(value, self._mask(value))

    def plan(self, obs: np.ndarray, key: Tensor) -> Plan:
        """One plan for each observation [N, O], with random keys [N]."""
        known, key = self.known(obs), key.to(self.schedule.abar.device)
        if self.config.planner.sampler == "ddpm":
            x = ddpm(self.denoise, self.schedule, known, key, self._clip)
        else:
            x = ddim(self.denoise, self.schedule, known, key, self.config.planner.steps, clip=self._clip)
        return self._decode(x)

    def denoising(self, obs: np.ndarray, key: Tensor, steps: int) -> list[Plan]:
        """The plans while they are denoised by `steps` steps of DDIM, pure noise first: to look at."""
        trace: list[Tensor] = []
        key = key.to(self.schedule.abar.device)
        ddim(self.denoise, self.schedule, self.known(obs), key, steps, clip=self._clip, trace=trace)
        return [self._decode(x) for x in trace]

    @property
    def _clip(self) -> float | None:
        """Bound on x_0: the data's range where that is known; six standard deviations; none without a normaliser."""
        return {"limits": 1.0, "quantile": 1.0, "gaussian": 6.0, "none": None}[self.config.normaliser]

    def _decode(self, x: Tensor) -> Plan:
        rows, action = self.codec.decode(x)
        return Plan(rows.cpu(), None if action is None else action.cpu(), self.config.stride)

    def policy(self, seed: int = 0, **options: Any) -> Planner:
        """The planner as a policy; `options` override fields of `config.planner` other than the sampler's."""
        c = self.config.planner
        settings = {"tracker": c.tracker, "execute": c.execute, "replan": c.replan, **options}
        return Planner(self.spec, self.config.fields, self.plan, seed, **settings)
