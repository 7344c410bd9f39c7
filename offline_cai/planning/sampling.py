"""How plans are drawn from a trajectory model: by a sampler, steered, the best of several, or as particles."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.data.codec import Codec
from offline_cai.diffusion.constraints import (
    ConstraintInUnits,
    HalfSpace,
    Inside,
    Outside,
    check_feasible,
)
from offline_cai.diffusion.evidence import (
    Evidence,
    Goal,
    InUnits,
    require_temperature,
    temperature_for,
    together,
)
from offline_cai.diffusion.guidance import GUIDES, projected
from offline_cai.diffusion.particles import sequential
from offline_cai.diffusion.residual import Residual
from offline_cai.diffusion.sampler import Denoise, Guide, ReverseVariance, ddim, ddpm, dpm_solver, unguided
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError
from offline_cai.inference.temperatures import posterior_kl
from offline_cai.planning.support import Short, Support, Supported
from offline_cai.planning.tracking import Pursuit, Tracker

READ_NOISED = ("at_noisy", "at_mean")
"""The guides that read a learned return at the noised rows; the others read it at clean ones."""


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
    tracker: Tracker = field(default_factory=Tracker)
    """Columns and gains of the PD controller."""
    pursuit: Pursuit = field(default_factory=Pursuit)
    """Columns and gains of the one that pursues a path."""

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
        if not 0 <= self.eta <= 1:
            raise UserError(f"planner.eta is {self.eta}; it is from 0 to 1.")
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


class Model(NamedTuple):
    """What plans are drawn from."""

    denoise: Denoise
    schedule: Schedule
    codec: Codec
    clip: float | None  # bound on x_0
    residual: Residual | None
    learned: Evidence | None  # a return, learned for noised rows or any other
    temperatures: tuple[float, float] | None  # the range that it is for; None: any
    support: Support | None  # where the data has been
    goal: tuple[int, ...]  # columns of a row that a goal fixes in the last one


class Drawn(NamedTuple):
    """n samples of each of N plans, weighted as `core.Plan` says."""

    x: Tensor  # [N, n, R, D]
    log_weight: Tensor  # [N, n]
    log_evidence: Tensor | None  # [N]
    legs: int = 1  # of the longest plans; shorter ones stay where they end


@torch.no_grad()
def draw(model: Model, known: Known, key: Tensor, c: PlannerConfig, temperature: float | None = None) -> Drawn:
    """Plans for the known rows [N, R, D], with random keys [N].

    Without candidates or particles there is one sample each. Candidates weigh by their evidence; unless a guide steered
    them they are samples of the model, so that these weights are proper and give the log-evidence.

    Args:
        temperature: in place of the config's, such as `temperature_of` finds.

    Raises:
        UserError: a guide without evidence, constraints that no row can satisfy, a sampler that cannot do as asked.
    """
    temperature = c.temperature if temperature is None else temperature
    require_temperature(temperature)
    guide, evidence = _guide(model, known, c, temperature), _evidence(model, c, noised=False)
    if evidence is None and max(c.candidates + c.detours, c.particles) > 1:
        raise UserError(f"planner: candidates or particles need evidence to compare them by: {_NAME_SOME}")
    settings: dict[str, Any] = {"reverse_variance": c.reverse_variance, "residual": _residual(model, c), "guide": guide}
    if evidence is not None and c.particles > 1:
        settings |= {"evidence": evidence, "temperature": temperature}
        given = model.denoise, model.schedule, known, key, c.steps, c.particles, model.clip
        found = sequential(*given, **settings)
        return Drawn(found.x, found.log_weight, found.log_evidence)
    x = _samples(model, known, key, c, c.candidates, settings)
    if c.detours:
        last = x[:, :, -1:].expand_as(x)  # a plan of one leg stays where it ends
        x = torch.cat([torch.cat([x, last], 2), _detours(model, known, key, c, settings)], 1)
    if evidence is None or x.shape[1] == 1:
        return Drawn(x, x.new_zeros(len(x), 1), None)
    value = _at_clean(evidence, x, temperature)
    mean = value.logsumexp(1) - math.log(x.shape[1])
    proper = guide is unguided and not c.detours
    return Drawn(x, value.log_softmax(1), mean if proper else None, 2 if c.detours else 1)


def _detours(model: Model, known: Known, key: Tensor, c: PlannerConfig, settings: dict[str, Any]) -> Tensor:
    """Plans [N, detours, 2R, D]: a leg to a place that the data has visited, and one on from the state it ends in."""
    if model.support is None or not model.goal:
        raise UserError(
            "planner.detours go through places that the data has visited to a goal: set model.support, and "
            "model.goal_field."
        )
    own, codec = seeding.split(seeding.split(key, 1)[:, 0], c.detours).flatten(), model.codec
    via = torch.zeros(len(own), known.value.shape[1], len(codec.columns)).to(known.value)
    via[..., list(model.support.config.columns)] = model.support.draw(own)[:, None]
    via, goal = codec.obs_norm.encode(via), [codec.actions + column for column in model.goal]
    first, second = (Known(*(part.repeat_interleave(c.detours, 0) for part in known)) for _ in range(2))
    first.value[:, -1, goal] = via[:, -1, list(model.goal)]
    legs = [_samples(model, first, seeding.split(own, 2)[:, 0], c, 1, settings)[:, 0]]
    second.value[:, 0, codec.state] = legs[0][:, -1, codec.state]
    legs.append(_samples(model, second, seeding.split(own, 2)[:, 1], c, 1, settings)[:, 0])
    return torch.cat(legs, 1).unflatten(0, (-1, c.detours))


@torch.no_grad()
def temperature_of(model: Model, known: Known, key: Tensor, c: PlannerConfig) -> float:
    """The temperature: the config's, or the one at which the return moves these plans by `kl_budget` nats.

    Raises:
        UserError: a budget that `kl_samples` unguided samples cannot express, or that no temperature of the learned
            return spends, or no evidence to spend it on.
    """
    if c.kl_budget is None:
        return c.temperature
    evidence = _evidence(model, c, noised=False)
    if evidence is None:
        raise UserError(f"planner.kl_budget is set, but there is nothing to spend it on: {_NAME_SOME}")
    settings = {"reverse_variance": c.reverse_variance, "residual": _residual(model, c), "guide": unguided}
    x = _samples(model, known, key, c, c.kl_samples, settings)
    if model.learned is None or model.temperatures is None:
        return temperature_for(evidence, x, c.kl_budget)
    learned = _AtClean(model.learned)  # no function of return / temperature

    def spent(temperature: float) -> float:
        return float(posterior_kl(_at_clean(learned, x, temperature).double(), 1.0).mean())

    return _bisect(spent, model.temperatures, c.kl_budget)


_NAME_SOME = "name some in planner.evidence, or train a learned return (algorithm: guide)."


@dataclass(frozen=True)
class _AtClean:
    """A learned return read at clean rows, as if of its lowest level: .1 % noise of 64 levels, 4 % of 8 (cosine)."""

    learned: Evidence
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return self.learned(x, torch.zeros_like(k), temperature)


def _residual(model: Model, c: PlannerConfig) -> Residual | None:
    """Where it is not needed, plans may have other rows than it was measured on."""
    return model.residual if c.needs_residual else None


def _evidence(model: Model, c: PlannerConfig, noised: bool) -> Evidence | None:
    """All there is, with the learned return read at noised rows or at clean ones; None if there is none."""
    parts: list[Evidence] = [InUnits(model.codec, goal) for goal in c.evidence.goals]
    if not c.evidence.project:
        parts += [ConstraintInUnits(model.codec, constraint) for constraint in c.evidence.constraints]
    if c.evidence.length:
        parts.append(InUnits(model.codec, Short(c.pursuit.position, c.evidence.length)))
    if c.evidence.support:
        if model.support is None:
            raise UserError("planner.evidence.support needs to know where the data has been: set model.support.")
        parts.append(InUnits(model.codec, Supported(model.support, c.evidence.support, c.evidence.margin)))
    if model.learned is not None:
        parts.append(_AtClean(model.learned) if model.learned.noisy and not noised else model.learned)
    return together(*parts) if parts else None


def _guide(model: Model, known: Known, c: PlannerConfig, temperature: float) -> Guide:
    guide, evidence = unguided, _evidence(model, c, noised=c.guide in READ_NOISED)
    if c.guide != "none":
        if evidence is None:
            raise UserError(f"planner.guide is {c.guide}, but there is nothing to steer by: {_NAME_SOME}")
        guide = partial(GUIDES[c.guide], evidence=evidence, temperature=temperature)
        if c.guide == "at_noisy":
            guide = partial(guide, repeats=c.guide_repeats, lowest=c.guide_lowest)
    constraints = [ConstraintInUnits(model.codec, constraint) for constraint in c.evidence.constraints]
    if constraints:
        check_feasible(constraints, known)
    if constraints and c.evidence.project:
        guide = partial(projected, guide=guide, constraints=constraints)
    return guide


def _samples(model: Model, known: Known, key: Tensor, c: PlannerConfig, count: int, settings: dict[str, Any]) -> Tensor:
    """`count` samples [N, count, R, D] of each plan."""
    if count > 1:
        key = seeding.split(key, count).flatten()
        known = Known(*(part.repeat_interleave(count, 0) for part in known))
    given = model.denoise, model.schedule, known, key
    if c.sampler == "ddpm":
        x = ddpm(*given, model.clip, steps=c.steps, **settings)
    elif c.sampler == "ddim":
        x = ddim(*given, c.steps, c.eta, model.clip, **settings)
    else:
        settings = {name: value for name, value in settings.items() if name != "reverse_variance"}
        x = dpm_solver(*given, c.steps, model.clip, **settings)
    return x.unflatten(0, (-1, count))


def _at_clean(evidence: Evidence, x: Tensor, temperature: float) -> Tensor:
    """Nats [N, n] of samples [N, n, R, D]."""
    flat = x.flatten(0, 1)
    return evidence(flat, torch.zeros(len(flat), dtype=torch.int64, device=x.device), temperature).view(x.shape[:2])


def _bisect(kl: Callable[[float], float], bounds: tuple[float, float], budget: float) -> float:
    """The temperature within the bounds at which a falling KL meets the budget.

    Raises:
        UserError: no temperature there does.
    """
    cold, hot = bounds
    most, least = kl(cold), kl(hot)
    if not least <= budget <= most:
        raise UserError(
            f"planner.kl_budget is {budget} nats, but at the temperatures that this guide was learned for ({cold:.4g} "
            f"to {hot:.4g}) the return moves these plans by {least:.3g} to {most:.3g} nats."
        )
    for _ in range(30):
        middle = math.sqrt(cold * hot)
        cold, hot = (middle, hot) if kl(middle) > budget else (cold, middle)
    return math.sqrt(cold * hot)
