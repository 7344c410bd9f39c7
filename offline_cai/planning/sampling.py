"""How plans are drawn from a trajectory model: by a sampler, steered, the best of several, or as particles."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.data.codec import Codec
from offline_cai.diffusion.constraints import SLACK, ConstraintInUnits, check_feasible
from offline_cai.diffusion.evidence import (
    Evidence,
    InUnits,
    require_temperature,
    temperature_for,
    together,
)
from offline_cai.diffusion.guidance import GUIDES, projected
from offline_cai.diffusion.particles import sequential
from offline_cai.diffusion.residual import Residual
from offline_cai.diffusion.sampler import Denoise, Guide, Warm, ddim, ddpm, dpm_solver, unguided
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import Notice, UserError
from offline_cai.inference.temperatures import posterior_kl
from offline_cai.planning.config import PlannerConfig
from offline_cai.planning.support import Quick, Short, Support, Supported, dense

READ_NOISED = ("at_noisy", "at_mean")
"""The guides that read a learned return at the noised rows; the others read it at clean ones."""


class Model(NamedTuple):
    """What plans are drawn from."""

    denoise: Denoise
    schedule: Schedule
    codec: Codec
    clip: float | None  # bound on x_0
    residual: Residual | None
    learned: Evidence | None  # a return, learned for noised rows or any other
    temperatures: tuple[float, float] | None  # the range that it is for; None: any
    support: Support | None = None  # where the data has been
    goal: tuple[int, ...] = ()  # columns of a row that a goal fixes in the last one


class Drawn(NamedTuple):
    """n samples of each of N plans, weighted as `core.Plan` says."""

    x: Tensor  # [N, n, R, D]
    log_weight: Tensor  # [N, n]
    log_evidence: Tensor | None = None  # [N]
    nats: dict[str, Tensor] | None = None  # [N, n] by the parts of the evidence
    feasible: Tensor | None = None  # [N, n] bool


@torch.no_grad()
def draw(
    model: Model,
    known: Known,
    key: Tensor,
    c: PlannerConfig,
    temperature: float | None = None,
    under_way: Tensor | None = None,
) -> Drawn:
    """Plans for the known rows [N, R, D], with random keys [N].

    Without candidates or particles there is one sample each. Candidates weigh by their evidence; if they are samples of
    the model and nothing else (no guide, no detours, nothing under way, noise 1), these weights are proper and give the
    log-evidence. Where none of a plan's samples keeps all constraints and stays where the data has been, a notice says
    so.

    Args:
        temperature: in place of the config's, such as `temperature_of` finds.
        under_way: what is left of the plans that these may replace, [N, R, D] (2R rows with detours), for the config's
            `keep` and `warm_start`.

    Raises:
        UserError: a guide without evidence, constraints that no row can satisfy, a goal far from all data, a sampler
            that cannot do as asked.
    """
    temperature = c.temperature if temperature is None else temperature
    require_temperature(temperature)
    _require_near(model, known)
    guide, parts = _guide(model, known, c, temperature), _parts(model, c, noised=False)
    if not parts and (max(c.candidates + c.detours, c.particles) > 1 or c.keep):
        raise UserError(f"planner: candidates or particles need evidence to compare them by: {_NAME_SOME}")
    settings: dict[str, Any] = {"reverse_variance": c.reverse_variance, "residual": _residual(model, c), "guide": guide}
    if parts and c.particles > 1:
        settings |= {"evidence": together(*parts.values()), "temperature": temperature}
        given = model.denoise, model.schedule, known, key, c.steps, c.particles, model.clip
        found = sequential(*given, **settings)
        feasible = _feasible(model, c, known, _Read(model, found.x))
        return Drawn(found.x, found.log_weight, found.log_evidence, feasible=feasible)
    settings["noise"] = c.noise
    if c.detours:
        x = _with_detours(model, known, key, c, settings)
    else:
        x = _samples(model, known, key, c, c.candidates, settings, under_way if c.warm_start else None)
    if under_way is not None and c.keep:
        x = torch.cat([under_way[:, None], x], 1)
    read = _Read(model, x)
    feasible = _feasible(model, c, known, read)
    if not parts or x.shape[1] == 1:
        return Drawn(x, x.new_zeros(len(x), 1), feasible=feasible)
    nats = {name: read.nats(part, temperature) for name, part in parts.items()}
    value = torch.stack(list(nats.values())).sum(0)
    own = not c.detours and under_way is None and c.noise == 1 and guide is unguided  # samples of the model alone
    mean = value.logsumexp(1) - math.log(x.shape[1]) if own else None
    return Drawn(x, value.log_softmax(1), mean, nats, feasible)


def _stretched(x: Tensor) -> Tensor:
    """Rows [N, n, R, D] as 2R rows, evenly spaced."""
    rows = x.shape[2]
    at = torch.linspace(0, rows - 1, 2 * rows, device=x.device).to(x)
    low = at.long().clamp(max=rows - 2)
    return torch.lerp(x[:, :, low], x[:, :, low + 1], (at - low)[:, None])


class _Read:
    """Samples x [N, n, R, D] as their judges read them; what several of them read is computed once."""

    def __init__(self, model: Model, x: Tensor) -> None:
        self._model, self.shape, self._rows = model, x.shape[:2], x.flatten(0, 1)

    @cached_property
    def obs(self) -> Tensor:
        """In raw units, [N n, R, O']."""
        return self._model.codec.decode(self._rows)[0]

    @cached_property
    def away(self) -> Tensor:
        """How far their points and those between are from where the data has been, [N n, 4 (R - 1) + 1]."""
        assert self._model.support is not None
        return self._model.support.along(self.obs)

    def nats(self, evidence: Evidence, temperature: float) -> Tensor:
        """What the samples are worth, [N, n]."""
        level = torch.zeros(len(self._rows), dtype=torch.int64, device=self._rows.device)
        if not isinstance(evidence, InUnits):
            value = evidence(self._rows, level, temperature)
        elif isinstance(evidence.evidence, Supported):
            value = evidence.evidence.of(self.away[:, ::2])
        else:
            value = evidence.evidence(self.obs, level, temperature)
        return value.view(self.shape)


def _feasible(model: Model, c: PlannerConfig, known: Known, read: _Read) -> Tensor | None:
    """Whether plans [N, n] keep all constraints, and stay within two margins of the data; None: nothing asks.

    The first row is what it is. A notice says so where none of a state's plans does.
    """
    if not c.evidence.constraints and not c.evidence.support:
        return None
    kept = torch.ones(len(read.obs), dtype=torch.bool, device=read.obs.device)
    if c.evidence.constraints:
        rows = dense(read.obs)[:, 1:]
        for constraint in c.evidence.constraints:
            kept &= (constraint.violation(rows) <= SLACK * constraint.width).all(1)
    if c.evidence.support and model.support is not None:
        kept &= (read.away[:, 1:] <= 2 * c.evidence.margin).all(1)
    feasible = kept.view(read.shape)
    if not feasible.any(1).all():
        none = int((~feasible.any(1)).nonzero()[0])
        warnings.warn(Notice(_no_way(model, c, known, none, read.shape[1])), stacklevel=3)
    return feasible


def _require_near(model: Model, known: Known) -> None:
    """
    Raises:
        UserError: a goal is too far from where the data has been for a plan to know how to get there.
    """
    if model.support is None or not model.goal or model.goal != model.support.config.columns:
        return
    goal = model.codec.decode(known.value[:, -1:])[0][:, 0, list(model.goal)]
    away = model.support(goal)
    if (away > model.support.config.far).any():
        worst = int(away.argmax())
        start = model.codec.decode(known.value[worst : worst + 1, :1])[0][0, 0, list(model.goal)]
        places = model.support.reachable(start)
        nearest = places[(places - goal[worst].to(places)).norm(dim=1).argmin()]
        place, other = (", ".join(f"{v:.3g}" for v in at) for at in (goal[worst], nearest))
        raise UserError(
            f"the goal ({place}) is {float(away[worst]):.2g} from the nearest place that the data has visited: plans "
            f"know no way there. The nearest that the data leads to is ({other}): take it, or collect data around the "
            "goal."
        )


def _no_way(model: Model, c: PlannerConfig, known: Known, plan: int, count: int) -> str:
    """Why none of the candidates of a plan is feasible."""
    best = f"of its {count} candidates the one with the most evidence is executed."
    if model.support is not None and model.goal == model.support.config.columns:
        rows = model.codec.decode(known.value[plan : plan + 1])[0][0, :, list(model.goal)]
        if not model.support.connected(rows[0], rows[-1]):
            return f"the data leads no way from the start of a plan to its goal: {best}"
        if not model.support.connected(rows[0], rows[-1], c.evidence.constraints):
            return (
                "the constraints leave no way from the start of a plan to its goal through the places that the data "
                f"has visited: loosen one; {best}"
            )
    asked = ["keeps all constraints"] * bool(c.evidence.constraints) + ["stays where the data has been"] * bool(
        c.evidence.support
    )
    return (
        f"no candidate of a plan {' and '.join(asked)}: {best} More of them (planner.candidates, planner.detours) may "
        "find a way."
    )


def _with_detours(model: Model, known: Known, key: Tensor, c: PlannerConfig, settings: dict[str, Any]) -> Tensor:
    """Plans [N, candidates + detours, 2R, D]: those of one leg, stretched, then those of two.

    A detour is a leg to a place that the data has visited, and one on from the state it ends in. Where that state is
    known beforehand, all are drawn at once.
    """
    if model.support is None or not model.goal:
        raise UserError(
            "planner.detours go through places that the data has visited to a goal: set model.support, and "
            "model.goal_field."
        )
    own, codec = seeding.split(seeding.split(key, 1)[:, 0], c.detours).flatten(), model.codec
    one, two = seeding.split(own, 2).unbind(1)
    via = torch.zeros(len(own), known.value.shape[1], len(codec.columns)).to(known.value)
    via[..., list(model.support.config.columns)] = model.support.draw(own, c.evidence.constraints)[:, None].to(via)
    via, goal = codec.obs_norm.encode(via), [codec.actions + column for column in model.goal]
    direct, first, second = _repeated(known, c.candidates), _repeated(known, c.detours), _repeated(known, c.detours)
    first.value[:, -1, goal] = via[:, -1, list(model.goal)]
    keys, sample = _keys(key, c.candidates), partial(_sample, model, c=c, settings=settings)
    if known.mask[:, -1, codec.state].all():
        second.value[:, 0, codec.state] = first.value[:, -1, codec.state]
        every = Known(*(torch.cat(parts) for parts in zip(direct, first, second, strict=True)))
        straight, *legs = sample(every, torch.cat([keys, one, two])).split([len(keys), len(one), len(two)])
    else:
        straight, legs = sample(direct, keys), [sample(first, one)]
        second.value[:, 0, codec.state] = legs[0][:, -1, codec.state]
        legs.append(sample(second, two))
    if codec.span:
        both = codec.encode_steps(codec.steps(legs[0]) + codec.steps(legs[1]))
        for leg in legs:
            leg[..., -1] = both
    detours = torch.cat(legs, 1).unflatten(0, (-1, c.detours))
    return torch.cat([_stretched(straight.unflatten(0, (-1, c.candidates))), detours], 1)


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
    learned, read = _AtClean(model.learned), _Read(model, x)  # no function of return / temperature

    def spent(temperature: float) -> float:
        return float(posterior_kl(read.nats(learned, temperature).double(), 1.0).mean())

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


def _parts(model: Model, c: PlannerConfig, noised: bool) -> dict[str, Evidence]:
    """All evidence there is by name, with the learned return read at noised rows or at clean ones."""
    parts: dict[str, Evidence] = {}

    def add(name: str, *evidence: Evidence) -> None:
        if evidence:
            parts[name] = InUnits(model.codec, evidence[0] if len(evidence) == 1 else together(*evidence))

    add("goals", *c.evidence.goals)
    if not c.evidence.project:
        add("constraints", *c.evidence.constraints)
    if c.evidence.length:
        add("length", Short(c.pursuit.position, c.evidence.length))
    if c.evidence.support:
        if model.support is None:
            raise UserError("planner.evidence.support needs to know where the data has been: set model.support.")
        add("support", Supported(model.support, c.evidence.support, c.evidence.margin))
    if c.evidence.duration:
        parts["duration"] = Quick(model.codec, c.evidence.duration)
    if model.learned is not None:
        parts["return"] = _AtClean(model.learned) if model.learned.noisy and not noised else model.learned
    return parts


def _evidence(model: Model, c: PlannerConfig, noised: bool) -> Evidence | None:
    parts = _parts(model, c, noised)
    return together(*parts.values()) if parts else None


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
        free = known.mask.clone()
        free[:, 0] &= c.evidence.project  # where a plan begins is what it is, unless projection has to move it
        check_feasible(constraints, Known(known.value, free))
    if constraints and c.evidence.project:
        guide = partial(projected, guide=guide, constraints=constraints)
    return guide


def _samples(
    model: Model,
    known: Known,
    key: Tensor,
    c: PlannerConfig,
    count: int,
    settings: dict[str, Any],
    begin: Tensor | None = None,
) -> Tensor:
    """`count` samples [N, count, R, D] of each plan; from `begin` [N, R, D] on, noised, where that is given."""
    if begin is not None and c.warm_start is not None:
        settings = {**settings, "warm": Warm(begin.repeat_interleave(count, 0), c.warm_start)}
    x = _sample(model, _repeated(known, count), _keys(key, count), c, settings)
    return x.unflatten(0, (-1, count))


def _repeated(known: Known, count: int) -> Known:
    """The known rows of `count` samples of each plan, one after the other."""
    return Known(*(part.repeat_interleave(count, 0) for part in known))


def _keys(key: Tensor, count: int) -> Tensor:
    """The keys [N count] of `count` samples of each plan; a single one has the plan's."""
    return seeding.split(key, count).flatten() if count > 1 else key


def _sample(model: Model, known: Known, key: Tensor, c: PlannerConfig, settings: dict[str, Any]) -> Tensor:
    """One sample [M, R, D] for each of M known rows and keys."""
    given = model.denoise, model.schedule, known, key
    if c.sampler == "ddpm":
        return ddpm(*given, model.clip, steps=c.steps, **settings)
    if c.sampler == "ddim":
        return ddim(*given, c.steps, c.eta, model.clip, **settings)
    settings = {name: value for name, value in settings.items() if name != "reverse_variance"}
    return dpm_solver(*given, c.steps, model.clip, **settings)


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
