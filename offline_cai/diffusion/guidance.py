"""Guides: what is believed of x_0 at x_k once evidence counts, one function for each way.

Bind the evidence and give the result to a sampler: `partial(corrected, evidence=..., temperature=...)`. With J the
evidence in nats, the exact belief is p(x_0 | x_k) exp(J(x_0)), whose normaliser moves x_k by its gradient:

| function | takes for it | gradients | held to the truth |
|---|---|---|---|
| `at_noisy` | J at x_k, before the mean (the public code of Diffuser) | of J | biased at any number of steps |
| `at_mean` | J at the mean of the step (Dhariwal and Nichol 2021, algorithm 1) | of J | biased |
| `through_denoiser` | J at D(x_k, k) (Chung et al. 2023) | of J and of the network | biased |
| `corrected` | J under N(D(x_k, k), averaged residual covariance) | of J | exact for Gaussians, quadratic J |
| `jacobian` | J under N(D(x_k, k), its own Jacobian's covariance) | of J, d through the network | as `corrected` |
| `classifier_free` | a denoiser that was told the condition (Ho and Salimans 2022) | none | |
| `best_of` | the best of K unguided samples | none | |

Evidence that was learned for noised rows (`noisy`) serves the first two; the others want evidence about x_0.

The papers of the first three move the mean by DDPM's posterior variance times a gradient, and so do these where the
sampler is DDPM. With less noise (DDIM's eta, DPM-Solver++) the same evidence moves it less: an ordinary differential
equation carries half of the score that the stochastic one does (Song et al. 2021b, equation 13).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offline_cai.core import Denoiser
from offline_cai.diffusion.constraints import Constraint, project
from offline_cai.diffusion.evidence import Evidence, require_temperature
from offline_cai.diffusion.residual import FLOOR, Spread
from offline_cai.diffusion.sampler import Belief, Denoise, Guide, Guided, Step, unguided
from offline_cai.errors import UserError

HALVINGS = 6  # of a Newton step that does not climb
CONVERGED = 2e-3  # twice the nats that another Newton step would gain
LEAST = 0.1  # of the posterior's precision in a direction where the evidence is convex, relative to the prior's


def at_noisy(
    denoise: Denoise,
    x: Tensor,
    step: Step,
    *,
    evidence: Evidence,
    temperature: float,
    repeats: int = 1,
    lowest: int = 0,
) -> Guided:
    """x_k moved by `_reach` · ∇J(x_k), `repeats` times, then denoised (Janner et al. 2022, their code).

    Evidence about x_0 is read as if x_k were x_0. Levels below `lowest` are not steered.
    """
    _check(evidence, temperature)
    if step.level < lowest:
        return unguided(denoise, x, step)
    moved = x
    for _ in range(repeats):
        value, slope = _slope(lambda y: evidence(y, step.k, temperature), moved)
        moved = step.known.impose(moved + _reach(step) * slope)
    clean = denoise(moved, step.k)
    shifted = clean + step.direction / math.sqrt(1 - step.abar) / step.clean * (moved - x)
    return _steered(clean, shifted, value, step)._replace(prior=None)


def at_mean(denoise: Denoise, x: Tensor, step: Step, *, evidence: Evidence, temperature: float) -> Guided:
    """The mean of the step moved by `_reach` · ∇J there (Dhariwal and Nichol 2021, algorithm 1)."""
    _check(evidence, temperature)
    clean = denoise(x, step.k)
    mean, k = step.known.impose(step.mean(x, clean)), torch.full_like(step.k, max(step.following, 0))
    value, slope = _slope(lambda y: evidence(y, k, temperature), mean)
    return _steered(clean, clean + _reach(step) / step.clean * slope, value, step)


def through_denoiser(denoise: Denoise, x: Tensor, step: Step, *, evidence: Evidence, temperature: float) -> Guided:
    """The mean of the step moved by posterior variance · ∇ J(D(x_k, k)), by a backward pass through the network.

    At eta below 1 it is the estimate that moves, by (1 - abar) / sqrt(abar) · ∇ J(D(x_k, k)): Tweedie's formula for
    x_k whose score is the model's and this gradient.
    What a value network that was trained to perfection by regression does (Diffuser's, for a J that is linear).
    """
    _check(evidence, temperature, clean=True)
    found: list[Tensor] = []

    def of_estimate(y: Tensor) -> Tensor:
        found.append(denoise(y, step.k))
        return evidence(found[-1], torch.zeros_like(step.k), temperature)

    value, slope = _slope(of_estimate, x)
    clean = found[-1].detach()
    reach = step.posterior_variance / step.clean if step.eta == 1 else (1 - step.abar) / math.sqrt(step.abar)
    return _steered(clean, clean + reach * slope, value, step)


def corrected(
    denoise: Denoise, x: Tensor, step: Step, *, evidence: Evidence, temperature: float, newton: int = 10
) -> Guided:
    """The evidence weighed by the residual covariance C of the level: one forward pass, no backward pass through it.

    With m = D(x_k, k), argmax over y of J(y) - ½ |y - m|² in C^-1 replaces m in the step, and (C^-1 - ∇²J)^-1 there
    replaces C in the noise. With the exact denoiser of Gaussian data and a quadratic J, every step has the exact law.

    Args:
        newton: damped Newton steps at most, where J is not quadratic; they end when no sample would gain .001 nats by
            another. One is a linearisation; too few are noise in the weights of particles.

    Raises:
        UserError: the sampler was not given the residual covariance; evidence for noised rows.
    """
    _check(evidence, temperature, clean=True)
    if step.residual is None:
        raise UserError("corrected guidance steers with the residual covariance, and none is given: residual.measure.")
    return _weighed(Belief(denoise(x, step.k), step.residual), evidence, temperature, newton)


def jacobian(
    denoise: Denoise, x: Tensor, step: Step, *, evidence: Evidence, temperature: float, newton: int = 10
) -> Guided:
    """`corrected` with Cov[x_0 | x_k] = (1 - abar) / sqrt(abar) ∂D/∂x_k of each sample, by d Jacobian-vector products.

    To compare with: it costs d passes, and at high noise it amplifies the network's errors by 1 / sqrt(abar).

    Raises:
        UserError: the plans do not know the same numbers; evidence for noised rows.
    """
    _check(evidence, temperature, clean=True)
    if (step.known.mask != step.known.mask[:1]).any():
        raise UserError("jacobian guidance takes plans of which the same numbers are known: sample them apart.")
    if step.known.mask.all():
        return unguided(denoise, x, step)
    free = (~step.known.mask[0]).flatten().nonzero()[:, 0]
    columns, clean = [], denoise(x, step.k)
    for number in free:
        direction = torch.zeros_like(x).flatten(1)
        direction[:, number] = 1.0
        column = torch.func.jvp(lambda y: denoise(y, step.k), (x,), (direction.view_as(x),))[1]
        columns.append(column.flatten(1)[:, free])
    covariance = torch.stack(columns, -1) * ((1 - step.abar) / math.sqrt(step.abar))
    variance, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    variance = torch.maximum(variance, FLOOR * variance[:, -1:].abs() + torch.finfo(x.dtype).tiny)
    basis = x.new_zeros(len(x), x[0].numel(), len(free))
    basis[:, free] = vectors
    spread = Spread(basis, torch.diag_embed(variance.sqrt()), x.new_zeros(()), (~step.known.mask[0]).flatten().to(x))
    return _weighed(Belief(clean, spread), evidence, temperature, newton)


def projected(denoise: Denoise, x: Tensor, step: Step, *, guide: Guide, constraints: Sequence[Constraint]) -> Guided:
    """Another guide's belief with its mean moved to where all constraints hold (`constraints.project`).

    The last step adds no noise to it, so that the samples satisfy them as the mean does.
    """
    guided = guide(denoise, x, step)
    mean, spread = guided.posterior
    inside = Belief(project(constraints, step.known, mean), spread if step.following >= 0 else None)
    return guided._replace(posterior=inside)


def classifier_free(denoiser: Denoiser, condition: Tensor, weight: float = 1.0) -> Denoise:
    """The denoiser that was told `condition` [N, C], and `weight` times its difference to the one that was not.

    weight 1 is the conditional model, 0 the unconditional one; more extrapolates (Ho and Salimans 2022, equation 6).
    """

    def denoise(x: Tensor, k: Tensor) -> Tensor:
        told = denoiser(x, k, condition)
        return told if weight == 1 else torch.lerp(denoiser(x, k), told, weight)

    return denoise


def best_of(x: Tensor, evidence: Evidence, temperature: float) -> Tensor:
    """Of K samples [N, K, R, D] of each plan the one with the most evidence, [N, R, D]."""
    _check(evidence, temperature)
    flat = x.flatten(0, 1)
    value = evidence(flat, torch.zeros(len(flat), dtype=torch.int64, device=x.device), temperature)
    return x[torch.arange(len(x), device=x.device), value.view(x.shape[:2]).argmax(1)]


GUIDES: dict[str, Callable[..., Guided]] = {
    "none": unguided,
    "at_noisy": at_noisy,
    "at_mean": at_mean,
    "through_denoiser": through_denoiser,
    "corrected": corrected,
    "jacobian": jacobian,
}
"""By the names that a config may use."""


def _check(evidence: Evidence, temperature: float, clean: bool = False) -> None:
    require_temperature(temperature)
    if clean and evidence.noisy:
        raise UserError(
            "this guide reads evidence off the denoised estimate, but the evidence was learned for noised rows: guide "
            "with at_noisy or at_mean, or give evidence about x_0."
        )


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The values [N] of a function of each row of x [N, ..], and its gradients.

    Raises:
        UserError: they are not finite.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = function(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    _finite(value, slope)
    return value.detach(), slope


def _finite(*numbers: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in numbers):
        raise UserError(
            "the evidence or its slope is not a finite number at rows that the model proposes: give a smooth function, "
            "a wider goal or barrier, and targets near the data."
        )


def _reach(step: Step) -> float:
    """By how much a gradient of log-evidence moves the mean of a step."""
    return (1 + step.eta**2) / 2 * step.posterior_variance


def _steered(clean: Tensor, shifted: Tensor, value: Tensor, step: Step) -> Guided:
    """A belief whose mean was moved and whose spread stays."""
    shifted = step.known.impose(shifted)
    return Guided(Belief(clean, step.residual), Belief(shifted, step.residual), value)


def _weighed(prior: Belief, evidence: Evidence, temperature: float, newton: int) -> Guided:
    """N(m, C) times exp(J), by Laplace's method in white coordinates: x_0 = m + F z, C = F Fᵀ, z ~ N(0, I)."""
    mean, spread = prior
    assert spread is not None
    factor, rounding = spread.factor.double(), torch.finfo(mean.dtype).eps

    def rows(z: Tensor) -> Tensor:
        return (mean[: len(z)] + (z[:, None] @ factor.mT)[:, 0].view(-1, *mean.shape[1:])).to(mean.dtype)

    def climb(z: Tensor) -> Tensor:
        level = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        return evidence(rows(z), level, temperature) - 0.5 * z.square().sum(-1)

    z = factor.new_zeros(len(mean), factor.shape[-1])
    if evidence.quadratic:
        value, slope = _slope(climb, z)
        chol = _precision(climb, z[:1], rounding)[0] if factor.ndim == 2 else _precision(climb, z, rounding)
        z = _solve(chol, slope)
        value = climb(z)
    else:
        for _ in range(newton):
            value, slope = _slope(climb, z)
            chol = _precision(climb, z, rounding)
            step = _solve(chol, slope)
            there = (slope * step).sum(-1) < CONVERGED
            if there.all():
                break
            z = torch.where(there[:, None], z, _uphill(climb, z, value, step))
        value = climb(z)
    root = torch.linalg.solve_triangular(chol, spread.root.double().mT, upper=False).mT.to(mean.dtype)
    log_evidence = value - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return Guided(prior, Belief(rows(z), spread._replace(root=root)), log_evidence.to(mean.dtype))


def _precision(function: Callable[[Tensor], Tensor], z: Tensor, rounding: float) -> Tensor:
    """The Cholesky factor [N, r, r] of minus the Hessian of a function of each row of z [N, r], where that is positive.

    Elsewhere its eigenvalues are raised to LEAST: the evidence is convex there, and has no Gaussian approximation.

    Raises:
        UserError: it is not finite, or so sharp that its rounding, relative as given, outweighs the prior's precision.
    """
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        rows = [torch.autograd.grad(part.sum(), leaf, retain_graph=True)[0] for part in slope.unbind(-1)]
    bend = -torch.stack(rows, -2) if rows else z.new_zeros(len(z), 0, 0)
    _finite(bend)
    if (bend.diagonal(dim1=-2, dim2=-1).abs().sum(-1) > 1 / rounding).any():
        raise UserError(
            "the evidence is too sharp to be weighed: widen its goals and barriers, or make an exact goal a known "
            "number."
        )
    bend = (bend + bend.mT) / 2
    chol, failed = torch.linalg.cholesky_ex(bend)
    if failed.any():
        values, vectors = torch.linalg.eigh(bend[failed > 0])
        raised = vectors * values.clamp(min=LEAST)[:, None] @ vectors.mT
        chol[failed > 0] = torch.linalg.cholesky(raised)
    return chol


def _solve(chol: Tensor, slope: Tensor) -> Tensor:
    """(chol · cholᵀ)^-1 slope, for slopes [N, r] and one factor [r, r] or one each [N, r, r]."""
    if chol.ndim == 2:
        return torch.cholesky_solve(slope.mT, chol).mT
    return torch.cholesky_solve(slope[..., None], chol)[..., 0]


def _uphill(function: Callable[[Tensor], Tensor], z: Tensor, value: Tensor, step: Tensor) -> Tensor:
    """z + step, the step halved for each sample until the function does not fall; z itself where it never climbs."""
    size = torch.ones_like(value)
    for _ in range(HALVINGS):
        worse = ~(function(z + size[:, None] * step) >= value)
        if not worse.any():
            break
        size = torch.where(worse, size / 2, size)
    worse = ~(function(z + size[:, None] * step) >= value)
    return z + torch.where(worse, 0.0, size)[:, None] * step
