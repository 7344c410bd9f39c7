"""Diffuser (Janner, Du, Tenenbaum and Levine 2022): planning by sampling from a diffusion over whole trajectories.

Prior: p(tau), the density of the data's windows. Known states are imposed at every level, in training as in sampling.
With `condition_dropout` the density is also learned given the return-to-go (classifier-free guidance, Ho and Salimans
2022; Ajay et al. 2023), and with `inverse_dynamics` the actions between planned states (Ajay et al. 2023, equation 8).
The paper's maze recipe is horizon 128, stride 1, multipliers 1-4-8, 64 levels, actions in the rows; the defaults here
are fewer, longer steps, which learn the same mazes in a fraction of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Algorithm, Batch, Chunks, Known, Loss, Needs, Plan, Spec, Step
from offline_cai.data.codec import Codec, Normaliser, NormaliserKind
from offline_cai.data.sampling import return_weights_for_kl
from offline_cai.diffusion.constraints import allowed
from offline_cai.diffusion.evidence import Evidence, Learned, fingerprint
from offline_cai.diffusion.guidance import classifier_free
from offline_cai.diffusion.residual import Residual, measure
from offline_cai.diffusion.sampler import ddim
from offline_cai.diffusion.schedule import Schedule, ScheduleKind
from offline_cai.errors import UserError
from offline_cai.networks.mlp import mlp
from offline_cai.networks.temporal_mlp import TemporalMLP
from offline_cai.networks.temporal_unet import TemporalUNet
from offline_cai.planning.config import PlannerConfig
from offline_cai.planning.planner import Planner
from offline_cai.planning.sampling import Drawn, Model, draw, temperature_of
from offline_cai.planning.support import Support, SupportConfig

SPAN_WEIGHT = 4.0
"""Weight in the loss of how long a segment takes, which all its rows say; a number of the first row has 1."""


@dataclass(frozen=True)
class GivenConfig:
    """A part of one row that plans are given."""

    row: int
    """From 0, or from the end: -1 is the last."""
    columns: tuple[int, ...]
    """Columns of the selected observation."""


@dataclass(frozen=True)
class DiffuserConfig:
    """The trajectory model, its noise and its planner."""

    rows: int = 16
    """Rows of a plan: it spans rows x stride time steps."""
    stride: int = 8
    """Time steps from one row to the next; with segments, 1."""
    segments: bool = False
    """Whether rows are those of whole segments of episodes, resampled, that end where they arrive: how long a plan
    takes is a number that it generates, and its rows have no fixed stride."""
    fields: tuple[str, ...] = ("observation",)
    """Fields of the observation that make a row."""
    goal_field: str | None = "desired_goal"
    """Field of the observation that says where a plan should end; null: plans have no goal."""
    goal_columns: tuple[int, ...] = (0, 1)
    """Columns of the selected observation that the goal fixes in the last row."""
    given: tuple[GivenConfig, ...] = ()
    """What else is given, such as a waypoint, [{row: 8, columns: [0, 1]}]: in training as in plans."""
    actions: bool = False
    """Whether rows also hold the actions of their time steps (needed to execute a plan by its own actions)."""
    normaliser: NormaliserKind = "limits"
    """limits (the range to [-1, 1]), gaussian (unit variance), quantile (flat on [-1, 1]) or none."""
    network: Literal["unet", "mlp"] = "unet"
    """The temporal U-Net, or a residual perceptron over all rows at once."""
    hidden: int = 512
    """Units of the perceptron's layers."""
    blocks: int = 4
    """Residual blocks of the perceptron."""
    channels: int = 32
    """Channels of the U-Net's first level, a multiple of 8."""
    multipliers: tuple[int, ...] = (1, 2, 4)
    """Channels of each level of the U-Net, as multiples of the first."""
    levels: int = 64
    """Noise levels T of the diffusion."""
    schedule: ScheduleKind = "cosine"
    """How the noise grows with the level."""
    prediction: Literal["x_0", "epsilon", "v"] = "x_0"
    """What the network predicts (v: sqrt(abar) epsilon - sqrt(1 - abar) x_0); the denoiser returns x_0 either way."""
    action_weight: float = 1.0
    """Weight of the first row's actions in the loss (10 in the paper's locomotion recipe)."""
    loss_discount: float = 1.0
    """Decay of the loss from row to row; the rows' weights have mean one."""
    condition_dropout: float | None = None
    """Train with the return-to-go as a condition that this share of the windows is not told; null: no condition."""
    inverse_dynamics: bool = False
    """Whether to learn the actions of a row from its state and the next (all `stride` of them at once)."""
    inverse_hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the inverse dynamics."""
    residual_windows: int = 0
    """Windows of data that the covariance of the denoiser's residual is measured on after training, at each level:
    corrected guidance and the analytic reverse variance need it; 0: it is not measured."""
    residual_rank: int | None = None
    """Directions that it keeps, the others share one variance; null: all of them."""
    discount: float = 0.99
    """Discount of the return-to-go, per time step."""
    kl_budget: float | None = None
    """Learn the posterior over whole episodes, p(tau | O) ∝ p(tau) exp(return / temperature), this many nats from the
    data: windows are drawn by the weight of their episode; null: learn the data."""
    support: SupportConfig | None = None
    """The grid that remembers where the data has been, for the planner's evidence; null: none."""
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    """How plans are sampled and executed."""

    def __post_init__(self) -> None:
        sizes = {"rows": self.rows, "stride": self.stride, "channels": self.channels, "levels": self.levels}
        sizes |= {"hidden": self.hidden, "blocks": self.blocks}
        if self.segments and (self.stride != 1 or self.actions or self.inverse_dynamics):
            raise UserError(
                "segments have no fixed stride and no actions between their rows: set stride: 1, actions: false and "
                "inverse_dynamics: false."
            )
        if self.segments and (self.kl_budget is not None or self.condition_dropout is not None):
            raise UserError(
                "segments are parts of episodes, without returns: leave kl_budget and condition_dropout at null."
            )
        if self.segments and self.planner.execute != "pursue":
            raise UserError("segments have no fixed time between their rows: set planner.execute: pursue.")
        if self.planner.evidence.duration and not self.segments:
            raise UserError("planner.evidence.duration is of plans that last as long as they take: set segments: true.")
        if self.residual_windows < 0 or (self.residual_rank is not None and self.residual_rank < 0):
            raise UserError(
                f"residual_windows ({self.residual_windows}) and residual_rank ({self.residual_rank}) are at least 0."
            )
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it has to be at least 1.")
        if not self.multipliers or min(self.multipliers) < 1:
            raise UserError(f"multipliers are {list(self.multipliers)}; give one level or more, each at least 1.")
        if not 0 < self.discount <= 1:
            raise UserError(f"discount is {self.discount}; it has to be above 0 and at most 1.")
        if self.kl_budget is not None and not self.kl_budget > 0:
            raise UserError(f"kl_budget is {self.kl_budget}; it is a positive number of nats, or null.")
        if self.planner.steps > self.levels:
            raise UserError(f"planner.steps is {self.planner.steps}, more than the {self.levels} noise levels.")
        if self.planner.execute == "actions" and not self.actions:
            raise UserError("planner.execute is actions, but the rows hold none: set actions: true.")
        if self.planner.execute == "inverse" and not self.inverse_dynamics:
            raise UserError("planner.execute is inverse, but nothing learns it: set inverse_dynamics: true.")
        if not self.action_weight >= 0 or not 0 < self.loss_discount <= 1:
            raise UserError(
                f"action_weight ({self.action_weight}) is at least 0, and loss_discount ({self.loss_discount}) above 0 "
                "and at most 1."
            )
        if self.condition_dropout is not None and not 0 <= self.condition_dropout < 1:
            raise UserError(f"condition_dropout is {self.condition_dropout}; it is a share in [0, 1), or null.")
        told = self.planner.target != PlannerConfig.target or self.planner.condition_weight != 1
        if self.condition_dropout is None and told:
            raise UserError(
                f"planner.target ({self.planner.target}) and condition_weight ({self.planner.condition_weight}) "
                "are for a model that is told the return, and this one is trained without: set condition_dropout "
                "(0.25, say) and train, or leave them out."
            )
        if self.condition_dropout == 0 and self.planner.condition_weight != 1:
            raise UserError("planner.condition_weight needs an unconditional estimate: set condition_dropout above 0.")
        if self.planner.needs_residual and not self.residual_windows:
            raise UserError(
                "planner: corrected guidance and the analytic reverse variance need the residual covariance: set "
                "residual_windows (4096, say) and train, or measure it on a trained model (Diffuser.measure)."
            )
        if self.residual_windows and self.condition_dropout is not None:
            raise UserError("residual_windows measures a denoiser that is told nothing: leave condition_dropout null.")


class Diffuser(Algorithm):
    Config = DiffuserConfig
    config: DiffuserConfig
    loss_weight: Tensor  # [R, D]
    residual_basis: Tensor  # [T, R·D, r]
    residual_variance: Tensor  # [T, r]
    residual_outer: Tensor  # [T]
    residual_mask: Tensor  # [R, D] bool

    def __init__(self, spec: Spec, config: DiffuserConfig) -> None:
        super().__init__(spec, config)
        c = config
        self.codec = Codec(spec, c.rows, c.stride, c.fields, c.actions, c.normaliser, c.segments)
        conditioned = c.condition_dropout is not None
        self.network: TemporalUNet | TemporalMLP
        if c.network == "mlp":
            sizes = (self.codec.width, c.rows, c.hidden, c.blocks)
            self.network = TemporalMLP(*sizes, condition=int(conditioned))
        else:
            self.network = TemporalUNet(self.codec.width, c.channels, c.multipliers, condition=int(conditioned))
        self.support = None if c.support is None else Support(c.support)
        self.schedule = Schedule(c.levels, c.schedule)
        self._learned: Evidence | None = None
        self._temperatures: tuple[float, float] | None = None
        self._require_rows("model.rows", c.rows)
        self._require_planner()
        if c.goal_field and len(spec.columns(c.goal_field)) != len(c.goal_columns):
            raise UserError(
                f"model.goal_columns names {len(c.goal_columns)} columns, not the width of {c.goal_field!r}."
            )
        if conditioned:
            self.return_norm = Normaliser(1, "quantile")
        if c.inverse_dynamics:
            self.inverse = mlp(2 * len(self.codec.columns), c.inverse_hidden, c.stride * spec.action_width)
        self.register_buffer("loss_weight", self._loss_weight(), persistent=False)
        if c.residual_windows:
            self._make_room_for_residual()

    def _make_room_for_residual(self) -> None:
        c, mask = self.config, self.mask(self.loss_weight[None])[0]
        free = int((~mask).sum())
        rank = free if c.residual_rank is None else min(c.residual_rank, free)
        self.register_buffer("residual_basis", self.loss_weight.new_zeros(c.levels, mask.numel(), rank))
        self.register_buffer("residual_variance", self.loss_weight.new_zeros(c.levels, rank))
        self.register_buffer("residual_outer", self.loss_weight.new_zeros(c.levels))
        self.register_buffer("residual_mask", mask, persistent=False)

    def plan_as(self, planner: PlannerConfig) -> None:
        """Plan as another config says from now on.

        Raises:
            UserError: it does not fit the model.
        """
        self.config = replace(self.config, planner=planner)
        self._require_planner()

    def _require_planner(self) -> None:
        c, width = self.config, len(self.codec.columns)
        rows = c.planner.rows or c.rows
        self._require_rows("planner.rows", rows)
        learned = self._learned is not None and self._learned.noisy
        if rows != c.rows and (learned or c.planner.needs_residual):
            what = "the learned return" if learned else "the residual covariance"
            raise UserError(
                f"planner.rows is {rows}, but {what} is for plans of {c.rows} rows, as in training: leave planner.rows "
                "out, or plan without it."
            )
        evidence = c.planner.evidence
        if c.support is None and (evidence.support or c.planner.detours):
            raise UserError(
                "planner.evidence.support and planner.detours need to know where the data has been: set model.support."
            )
        if c.planner.detours and (
            not c.goal_field or c.support is None or c.goal_columns != c.support.columns or c.given
        ):
            raise UserError(
                "planner.detours lead through places to a goal: set model.goal_field, with goal_columns as "
                "model.support.columns, and leave model.given empty."
            )
        if c.planner.detours and any(goal.row not in (None, -1) for goal in evidence.goals):
            raise UserError("planner.detours double the rows of plans: goals of evidence are for row -1 then, or null.")
        for name, used in (
            ("goal_columns", c.goal_columns if c.goal_field else ()),
            ("the tracker's columns", c.planner.tracker.columns if c.planner.execute == "track" else ()),
            ("the columns of model.given", [column for part in c.given for column in part.columns]),
            (
                "the pursuit's positions",
                c.planner.pursuit.position if c.planner.execute == "pursue" or evidence.length else (),
            ),
            ("the support's columns", () if c.support is None else c.support.columns),
            ("the evidence's columns", evidence.columns),
        ):
            if not all(0 <= column < width for column in used):
                raise UserError(
                    f"{name} are {list(used)}, but fields {list(c.fields)} make {width} columns: take numbers from 0 "
                    f"to {width - 1}."
                )
        asked = [("planner.evidence: a goal", goal.row) for goal in evidence.goals if goal.row is not None]
        for name, row in [*asked, *(("model.given: a part", part.row) for part in c.given)]:
            if not -rows <= row < rows:
                raise UserError(
                    f"{name} is for row {row}, but plans have {rows} rows: take 0 to {rows - 1}, or -1 for the last."
                )

    def _require_rows(self, name: str, rows: int) -> None:
        divisor = self.network.divisor
        if self.config.network == "mlp" and rows != self.config.rows:
            raise UserError(f"{name} is {rows}, but a perceptron plans the {self.config.rows} rows it was made for.")
        if rows < 2:
            raise UserError(f"{name} is {rows}, but a plan needs two rows or more.")
        if rows % divisor:
            below = max(rows // divisor * divisor, divisor, 2)
            raise UserError(
                f"{name} is {rows}, but a U-Net of {len(self.config.multipliers)} levels needs a multiple of "
                f"{divisor}: take {below} or {below + divisor}."
            )

    @property
    def needs(self) -> Needs:
        c = self.config
        groups = {"denoiser": ("network.",), "inverse": ("inverse.",)} if c.inverse_dynamics else {"all": ("",)}
        weigh = None if c.kl_budget is None else partial(return_weights_for_kl, kl_budget=c.kl_budget)
        return Needs(c.rows, c.stride, c.discount, groups=groups, weigh=weigh, segments=c.segments)

    def fit(self, chunks: Chunks) -> None:
        self.codec.fit(chunks)
        if self.support is not None:
            self.support.fit(chunks, [self.codec.columns[column] for column in self.support.config.columns])
        if self.config.condition_dropout is not None:
            self.return_norm.fit(chunk.returns[:, None] for chunk in chunks(self.config.discount))
        if self.config.inverse_dynamics:
            self.codec.action_norm.fit(chunk.action for chunk in chunks())

    @torch.no_grad()
    def finish(self, draw: Callable[[int], Batch]) -> None:
        """Measures the residual covariance of the denoiser that is told nothing."""
        c = self.config
        if c.residual_windows:
            batch = draw(c.residual_windows).to(self.schedule.abar.device)
            x = self.codec.encode(batch)
            found = measure(self._clipped, self.schedule, x, self.residual_mask, batch.key, c.residual_rank)
            for own, tensor in zip(self._residual_buffers, found, strict=True):
                own.copy_(tensor)

    def measure(self, draw: Callable[[int], Batch], windows: int = 4096, rank: int | None = None) -> None:
        """The residual covariance of a model that was trained without it, from `draw(windows)`; it is exported with it.

        Args:
            rank: as `DiffuserConfig.residual_rank`.
        """
        self.config = replace(self.config, residual_windows=windows, residual_rank=rank)
        self._make_room_for_residual()
        self.finish(draw)

    @property
    def _residual_buffers(self) -> Residual:
        left = self.residual_basis, self.residual_variance, self.residual_outer
        return Residual(*left, self.residual_mask, self.schedule.abar)

    def _clipped(self, x: Tensor, k: Tensor) -> Tensor:
        clean, clip = self.denoise(x, k), self._clip
        return clean if clip is None else clean.clamp(-clip, clip)

    @property
    def residual(self) -> Residual | None:
        """The measured covariance of x_0 - D(x_k, k), None where it is not measured."""
        if not self.config.residual_windows or not (self.residual_outer.any() or self.residual_variance.any()):
            return None
        return self._residual_buffers

    # Losses ----------------------------------------------------------------------------------------------------------

    def denoise(self, x: Tensor, k: Tensor, condition: Tensor | None = None) -> Tensor:
        """D(x_k, k) -> x_0: rows [N, R, D], levels [N]; condition [N, 1] is a level in [-1, 1] of the return's law."""
        output = self.network(x, k, condition)
        if self.config.prediction == "x_0":
            return output
        if self.config.prediction == "v":
            return self.schedule.clean_from_velocity(x, output, k)
        return self.schedule.clean_from_noise(x, output, k)

    def update(self, batch: Batch, step: Step) -> dict[str, float]:
        if not self.config.inverse_dynamics:
            return step(batch)
        return step(batch, "denoiser") | step(batch, "inverse")

    def forward(self, batch: Batch, phase: str = "all") -> Loss:
        return self._inverse_loss(batch) if phase == "inverse" else self._denoising_loss(batch)

    def _denoising_loss(self, batch: Batch) -> Loss:
        """Squared error of the network's prediction over the rows that are not known (paper, appendix C)."""
        x = self.codec.encode(batch)
        known = Known(x, self.mask(x))
        k = seeding.integers(batch.key, self.config.levels, stream=0)
        noise = seeding.normal(batch.key, tuple(x.shape[1:]), stream=1)
        noisy = known.impose(self.schedule.add_noise(x, noise, k))
        prediction = self.network(noisy, k, self._told(batch))
        target = {"x_0": x, "epsilon": noise, "v": self.schedule.velocity(x, noise, k)}[self.config.prediction]
        error = (prediction - target) ** 2 * ~known.mask * self.loss_weight
        return Loss({"loss": error.sum()}, (~known.mask).sum())

    def _loss_weight(self) -> Tensor:
        """Weights [R, D] of the squared errors, as in the paper's code: decay over rows, then the first actions'."""
        decay = self.config.loss_discount ** torch.arange(self.config.rows, dtype=torch.float32)
        weight = (decay / decay.mean())[:, None].repeat(1, self.codec.width)
        weight[0, : self.codec.actions] = self.config.action_weight
        if self.config.segments:
            weight[:, -1] *= SPAN_WEIGHT / self.config.rows
        return weight

    def _told(self, batch: Batch) -> Tensor | None:
        """The return-to-go of each window [B, 1] as a level of its law; NaN for the share that is told nothing."""
        share = self.config.condition_dropout
        if share is None:
            return None
        dropped = seeding.uniform(batch.key, (1,), stream=2) < share
        return self.return_norm.encode(batch.returns[:, :1]).masked_fill(dropped, torch.nan)

    def _inverse_loss(self, batch: Batch) -> Loss:
        """Squared error of the actions of blocks that end inside their episode, in the codec's units."""
        states = self.codec.encode_obs(batch.obs)
        error = (self._between(states) - self.codec.action_norm.encode(batch.action)) ** 2
        inside = batch.valid[..., None, None].expand_as(error)
        return Loss({"inverse_loss": (error * inside).sum()}, inside.sum())

    def _between(self, states: Tensor) -> Tensor:
        """The k actions [N, R-1, k, A] from each of the states [N, R, O'] to the next, in the codec's units."""
        pairs = torch.cat([states[:, :-1], states[:, 1:]], dim=-1)
        return self.inverse(pairs).unflatten(-1, (self.config.stride, self.spec.action_width))

    def mask(self, x: Tensor) -> Tensor:
        """The first row's state, in the last row the goal's columns, and what else is given."""
        mask = torch.zeros_like(x, dtype=torch.bool)
        mask[:, 0, self.codec.state] = True
        if self.config.goal_field:
            mask[:, -1, [self.codec.actions + column for column in self.config.goal_columns]] = True
        for part in self.config.given:
            mask[:, part.row, [self.codec.actions + column for column in part.columns]] = True
        return mask

    # Plans -----------------------------------------------------------------------------------------------------------

    def known(self, obs: np.ndarray, given: np.ndarray | None = None) -> Known:
        """The known rows for observations [N, O]: the state now, the goal if the observation names one, and `given`.

        Args:
            given: [N, m] in raw units, the m numbers of the config's `given`, in its order.

        Raises:
            UserError: there are more or fewer of them than the model was trained to be given.
        """
        parts = [(part.row, column) for part in self.config.given for column in part.columns]
        numbers = np.zeros((len(obs), 0)) if given is None else np.asarray(given)
        if numbers.shape != (len(obs), len(parts)) or not np.isfinite(numbers).all():
            raise UserError(
                f"plans of this model are given {len(parts)} numbers (model.given: row, column {parts}) for each of "
                f"{len(obs)} states, and got {list(numbers.shape)}: pass that many finite ones as `given`, or train "
                "with another model.given."
            )
        raw = np.asarray(obs, dtype=np.float32)
        rows = np.repeat(raw[:, None, self.codec.columns], self.config.planner.rows or self.config.rows, axis=1)
        if self.config.goal_field:
            rows[:, -1, list(self.config.goal_columns)] = raw[:, self.spec.columns(self.config.goal_field)]
        for (row, column), values in zip(parts, numbers.T, strict=True):
            rows[:, row, column] = values
        own = self.codec.obs_norm.encode(torch.from_numpy(rows).to(self.schedule.ends.device))
        value = own.new_zeros(*own.shape[:2], self.codec.width)
        value[..., self.codec.state] = own
        return Known(value, self.mask(value))

    @torch.no_grad()
    def plan(
        self,
        obs: np.ndarray,
        key: Tensor,
        temperature: float | None = None,
        given: np.ndarray | None = None,
        under_way: Plan | None = None,
    ) -> Plan:
        """Plans for observations [N, O], with random keys [N], as `config.planner` says; `given` as in `known`.

        `temperature` stands in for the one that the config gives, or that its KL budget gives for these observations.
        `under_way` is one plan for each observation that these may replace, from there on (`planner.keep`).
        """
        known, key = self.known(obs, given), key.to(self.schedule.abar.device)
        if temperature is None:
            temperature = temperature_of(self.model, known, key, self.config.planner)
        rest = None if under_way is None else self.encode(under_way)
        drawn = draw(self.model, known, key, self.config.planner, temperature, rest)
        return self._decode(drawn)._replace(temperature=temperature)

    def encode(self, plan: Plan) -> Tensor:
        """Rows [N, R, D] of the first plan of each state, as far as it tells them."""
        rows = plan.obs[:, 0].to(self.schedule.abar)
        x = rows.new_zeros(*rows.shape[:2], self.codec.width)
        x[..., self.codec.state] = self.codec.obs_norm.encode(rows)
        if plan.steps is not None:
            x[..., -1] = self.codec.encode_steps(plan.steps[:, :1].to(x))
        return x

    def temperature(self, obs: np.ndarray, key: Tensor, given: np.ndarray | None = None) -> float:
        """The temperature of the plans for observations [N, O]; `given` as in `known`."""
        known = self.known(obs, given)
        return temperature_of(self.model, known, key.to(self.schedule.abar.device), self.config.planner)

    def steer_by(self, evidence: Evidence, temperatures: tuple[float, float] | None = None) -> None:
        """Let a return count as evidence, for temperatures within a range, if it has one.

        It takes the place of one that was given before. `ReturnInUnits(diffuser.codec, function)` is any function of
        plans in raw units; a learned return is given by its guide.

        Raises:
            UserError: it was trained for another denoiser, schedule or codec, or for other rows than are planned.
        """
        if isinstance(evidence, Learned):
            evidence.check(self.fingerprint)
        self._learned, self._temperatures = evidence, temperatures
        self._require_planner()

    @property
    def fingerprint(self) -> str:
        """A hash of everything that noised rows and their denoising depend on."""
        predicts = ("x_0", "epsilon", "v").index(self.config.prediction)
        layout = torch.tensor([predicts, self.config.stride, *self.codec.columns])
        known = self.mask(self.loss_weight[None])
        return fingerprint(
            network=self.network, codec=self.codec, levels=self.schedule.abar, layout=layout, known=known
        )

    @property
    def model(self) -> Model:
        learned = (self._learned, self._temperatures)
        goal = self.config.goal_columns if self.config.goal_field else ()
        return Model(self._denoise, self.schedule, self.codec, self._clip, self.residual, *learned, self.support, goal)

    def _denoise(self, x: Tensor, k: Tensor) -> Tensor:
        """The denoiser that plans are drawn with: told the planner's target, if the model was trained with returns."""
        c = self.config
        if c.condition_dropout is None:
            return self.denoise(x, k)
        target = x.new_full((len(x), 1), 2 * c.planner.target - 1)
        return classifier_free(self.denoise, target, c.planner.condition_weight)(x, k)

    @torch.no_grad()
    def denoising(self, obs: np.ndarray, key: Tensor, steps: int) -> list[Plan]:
        """Unguided plans while they are denoised by `steps` steps of DDIM, pure noise first: to look at."""
        trace: list[Tensor] = []
        key = key.to(self.schedule.abar.device)
        ddim(self._denoise, self.schedule, self.known(obs), key, steps, clip=self._clip, trace=trace)
        return [self._decode(Drawn(x[:, None], x.new_zeros(len(x), 1))) for x in trace]

    @property
    def _clip(self) -> float | None:
        """Bound on x_0: the data's range where that is known; six standard deviations; none without a normaliser."""
        return {"limits": 1.0, "quantile": 1.0, "gaussian": 6.0, "none": None}[self.config.normaliser]

    def _decode(self, drawn: Drawn) -> Plan:
        x = drawn.x
        rows, action = self.codec.decode(x.flatten(0, 1))
        if self.config.planner.execute == "inverse":
            action = self.codec.action_norm.decode(self._between(x.flatten(0, 1)[..., self.codec.actions :]))
        plan = Plan(
            rows.unflatten(0, x.shape[:2]),
            None if action is None else action.unflatten(0, x.shape[:2]),
            self.config.stride,
            drawn.log_weight,
            drawn.log_evidence,
            steps=self.codec.steps(x).mean(-1) if self.config.segments else None,
            nats=drawn.nats,
            feasible=drawn.feasible,
        )
        return plan.cpu()

    def policy(self, seed: int = 0, given: np.ndarray | None = None, **options: Any) -> Planner:
        """The planner as a policy; `options` override fields of `config.planner` other than the sampler's.

        `given` [m] are the numbers that all plans are given, as in `known`. A KL budget becomes a temperature at the
        first plans, and stays it: it depends on the environments that are planned for first.
        """
        c = self.config.planner
        found: list[float] = []

        def propose(obs: np.ndarray, key: Tensor, under_way: Plan | None = None) -> Plan:
            numbers = None if given is None else np.tile(given, (len(obs), 1))
            if not found:
                found.append(self.temperature(obs, key, numbers))
            return self.plan(obs, key, found[0], numbers, under_way)

        def clear(places: np.ndarray) -> np.ndarray:
            return allowed(c.evidence.constraints, c.pursuit.position, torch.from_numpy(places), widths=1).numpy()

        execute = c.execute if c.execute in ("track", "pursue") else "actions"
        settings = {
            "tracker": c.tracker,
            "pursuit": c.pursuit,
            "execute": execute,
            "replan": c.replan,
            "go_on": c.keep or c.warm_start is not None,
            "state": c.state,
            "clear": clear if c.evidence.constraints else None,
            **options,
        }
        return Planner(self.spec, self.config.fields, propose, seed, **settings)
