"""How plans are sampled, compared and executed: the planner's part of a config."""

from dataclasses import dataclass, field
from typing import Literal

from offline_cai.diffusion.constraints import HalfSpace, Inside, Outside
from offline_cai.diffusion.evidence import Goal
from offline_cai.diffusion.sampler import ReverseVariance
from offline_cai.errors import UserError
from offline_cai.planning.tracking import Pursuit, Tracker


@dataclass(frozen=True)
class EvidenceConfig:
    """What plans should do besides being like the data, in raw units; all parts count together."""

    goals: tuple[Goal, ...] = ()
    """Places to be near: {target: [x, y], columns: [0, 1], width: 0.1, row: -1}; row null: in any row."""
    inside: tuple[Inside, ...] = ()
    """Boxes to stay in: {columns: [0, 1], low: [-1, -1], high: [1, 1], width: 0.1}."""
    outside: tuple[Outside, ...] = ()
    """Circles to avoid: {columns: [0, 1], centre: [0, 0], radius: 0.5, width: 0.1}."""
    half_spaces: tuple[HalfSpace, ...] = ()
    """Half-spaces to stay in: {columns: [0, 1], normal: [1, 0], offset: 2, width: 0.1}, normal . x <= offset."""
    project: bool = False
    """Move every estimate to a near point that all constraints allow, instead of a barrier at their borders."""
    length: float = 0.0
    """Nats that a plan pays for each unit of its path's length, over the positions of the planner's pursuit."""
    support: float = 0.0
    """Nats that a plan pays that lies wholly outside of where the data has been (model.support)."""
    margin: float = 0.05
    """How far from there counts as outside, in the observation's units."""
    duration: float = 0.0
    """Nats that a plan pays for each time step that it takes (model.segments)."""

    def __post_init__(self) -> None:
        for name in ("length", "support", "margin", "duration"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"planner.evidence.{name} is {getattr(self, name)}; take a finite number of at least 0."
                )

    @property
    def constraints(self) -> tuple[Inside | Outside | HalfSpace, ...]:
        return (*self.inside, *self.outside, *self.half_spaces)

    @property
    def columns(self) -> list[int]:
        """The columns of the selected observation that it looks at."""
        return [column for part in (*self.goals, *self.constraints) for column in part.columns]


@dataclass(frozen=True)
class PlannerConfig:
    """How plans are sampled and executed."""

    sampler: Literal["ddim", "ddpm", "dpm"] = "ddim"
    """The sampler of the reverse process: ddim, ddpm, or dpm (DPM-Solver++)."""
    steps: int = 2
    """Denoising steps."""
    eta: float = 0.0
    """Noise of ddim's steps: 0 is none, 1 as much as ddpm's."""
    noise: float = 1.0
    """Scale of all noise of the sampler: 1 draws plans as varied as the data's, 0 the one in their middle."""
    reverse_variance: ReverseVariance = "posterior"
    """Noise of a step: posterior or beta (Ho et al. 2020), or analytic, from the measured residual covariance."""
    guide: Literal["none", "at_noisy", "at_mean", "through_denoiser", "corrected", "jacobian"] = "none"
    """How the evidence steers the sampler; diffusion/guidance.py tells them apart."""
    guide_repeats: int = 1
    """Gradients that at_noisy follows at each level; 2 in Diffuser's code."""
    guide_lowest: int = 0
    """Lowest level that at_noisy steers at; 2 to 4 in Diffuser's code (t_stopgrad)."""
    temperature: float = 1.0
    """Units of return per nat."""
    kl_budget: float | None = None
    """Instead of a temperature: how many nats the return may move plans from the model, given what is known."""
    kl_samples: int = 64
    """Unguided samples of each plan that the temperature is found on; they express budgets below log(kl_samples)."""
    candidates: int = 1
    """Samples of each plan, of which the one with the most evidence is executed."""
    detours: int = 0
    """Further candidates of two legs each, through places that the data has visited, drawn at random."""
    particles: int = 1
    """Particles of each plan in sequential Monte Carlo over the guide's steps (sampler: ddpm)."""
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
    """What plans should do; a learned return counts as well where there is one (algorithm: guide)."""
    rows: int | None = None
    """Rows of a plan; null: as many as the windows of training have."""
    target: float = 0.95
    """Quantile of the data's return-to-go that plans are conditioned on, where the model was trained with one."""
    condition_weight: float = 1.0
    """1: the conditional estimate; 1 + w: w times further from the unconditional one (classifier-free guidance)."""
    execute: Literal["track", "pursue", "actions", "inverse"] = "track"
    """Follow the planned states in their time with the tracker, pursue their path as fast as it goes, play the planned
    actions, or those of the inverse dynamics."""
    replan: int | None = None
    """Steps after which a new plan is made; null: one plan per episode."""
    keep: bool = False
    """Whether what is left of the plan under way stays a candidate when new ones are made."""
    warm_start: float | None = None
    """Make new plans from the one under way, noised to this share of the levels and denoised in as large a share of the
    steps; null: from noise alone."""
    tracker: Tracker = field(default_factory=Tracker)
    """Columns and gains of the PD controller."""
    pursuit: Pursuit = field(default_factory=Pursuit)
    """Columns and gains of the one that pursues a path."""
    state: tuple[str, ...] | None = None
    """Fields of the observation that the tracker and the pursuit read; null: those of the model."""

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.replan is not None and self.replan < 1):
            raise UserError(f"planner: steps ({self.steps}) and replan ({self.replan}) have to be at least 1.")
        if not 0 <= self.target <= 1 or not 0 <= self.condition_weight < float("inf"):
            raise UserError(
                f"planner: target ({self.target}) is a quantile from 0 to 1, and condition_weight "
                f"({self.condition_weight}) a number of at least 0."
            )
        for name in ("temperature", "kl_budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                unit = "units of return per nat" if name == "temperature" else "nats"
                raise UserError(f"planner.{name} is {value}; take a positive number of {unit}.")
        if min(self.candidates, self.particles) != 1:
            raise UserError(
                f"planner: candidates is {self.candidates} and particles {self.particles}; each is at least 1, and one "
                "of them is 1: particles are chosen by their weights already."
            )
        if self.detours < 0 or (self.detours and self.particles > 1):
            raise UserError(
                f"planner.detours is {self.detours}; it is at least 0, and 0 with particles: they are candidates."
            )
        if self.keep and self.particles > 1:
            raise UserError("planner.keep makes the plan under way a candidate: leave planner.particles at 1.")
        if (self.keep or self.warm_start is not None) and (
            self.replan is None or self.execute not in ("track", "pursue")
        ):
            raise UserError(
                "planner.keep and planner.warm_start go on from the states of the plan under way: set planner.replan, "
                "and planner.execute to track or pursue."
            )
        if self.warm_start is not None and (
            not 0 < self.warm_start <= 1 or self.sampler == "dpm" or self.detours or self.particles > 1
        ):
            raise UserError(
                f"planner.warm_start is {self.warm_start}; take a share above 0 and at most 1, a sampler other than "
                "dpm, and neither detours nor particles."
            )
        if not 0 <= self.eta <= 1:
            raise UserError(f"planner.eta is {self.eta}; it is from 0 to 1.")
        if not 0 <= self.noise < float("inf") or (self.noise == 0 and self.candidates > 1):
            raise UserError(
                f"planner.noise is {self.noise}; it is at least 0, and above 0 with candidates, which it tells apart."
            )
        if self.particles > 1 and self.noise != 1:
            raise UserError(f"planner.noise is {self.noise}, but particles weigh by the model's own: leave it at 1.")
        if self.guide_repeats < 1 or self.guide_lowest < 0:
            raise UserError(
                f"planner.guide_repeats is {self.guide_repeats} and planner.guide_lowest {self.guide_lowest}; take at "
                "least 1 and at least 0."
            )
        if (self.guide_repeats, self.guide_lowest) != (1, 0) and self.guide != "at_noisy":
            raise UserError(
                f"planner.guide_repeats and planner.guide_lowest are for at_noisy, but planner.guide is {self.guide}: "
                "leave them out."
            )
        if self.sampler == "dpm" and self.reverse_variance != "posterior":
            raise UserError(
                f"planner.reverse_variance is {self.reverse_variance}, but dpm's steps have no noise: set "
                "planner.sampler to ddpm, or leave it at posterior."
            )
        if self.sampler == "ddim" and self.reverse_variance == "beta" and self.eta < 1:
            raise UserError(
                f"planner.reverse_variance beta is the noise of ddpm's steps, but planner.eta is {self.eta}: set "
                "planner.sampler to ddpm."
            )
        if self.kl_samples < 2:
            raise UserError(f"planner.kl_samples is {self.kl_samples}; it takes two samples or more to compare.")
        if self.particles > 1 and self.sampler != "ddpm":
            raise UserError(
                f"planner.particles are steps of ddpm, and planner.sampler is {self.sampler}: set it to ddpm."
            )

    @property
    def needs_residual(self) -> bool:
        return self.guide == "corrected" or self.reverse_variance == "analytic"
