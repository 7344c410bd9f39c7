"""Weighted particles: effective sample size, resampling, adaptive tempering (torch).

Log-weights are `[..., K]` in nats, need not be normalised, and may be -inf; every row is a population of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_sample_size(log_weight: Tensor) -> Tensor:
    """(Σ w)² / Σ w², `[...]`: K for equal weights, 1 when one particle holds everything.

    Raises:
        ValueError: a population whose weights are all zero, a NaN or +inf, no particles.
    """
    _check("log_weight", log_weight)
    return (2 * torch.logsumexp(log_weight, -1) - torch.logsumexp(2 * log_weight, -1)).exp()


def systematic(log_weight: Tensor, generator: torch.Generator | None = None, shift: Tensor | None = None) -> Tensor:
    """Indices `[..., K]` of a resampled population: one uniform shift of a regular comb (Kitagawa 1996).

    Particle i is copied floor or ceil of K · w_i times, and K · w_i times on average. shift `[..., 1]` in (0, 1) stands
    in for the generator's draw.

    Raises:
        ValueError: a population whose weights are all zero, a NaN or +inf, no particles.
    """
    _check("log_weight", log_weight)
    return _comb(log_weight, _uniform(log_weight, 1, generator) if shift is None else shift)


def stratified(log_weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices `[..., K]` of a resampled population: one uniform draw in each of K strata (Kitagawa 1996).

    Unbiased like `systematic`, with independent draws; copies differ from K · w_i by less than 2.

    Raises:
        ValueError: a population whose weights are all zero, a NaN or +inf, no particles.
    """
    _check("log_weight", log_weight)
    return _comb(log_weight, _uniform(log_weight, log_weight.shape[-1], generator))


def next_inverse_temperature(
    log_evidence: Tensor,
    inverse_temperature: Tensor | float = 0.0,
    *,
    log_weight: Tensor | None = None,
    keep: float = 0.5,
    final: float = 1.0,
) -> Tensor:
    """The next inverse temperature, up to `final`, at which this share of the effective sample size is left, `[...]`.

    Weights grow by (next - now) · log_evidence; bisection in each population (Del Moral et al. 2012), the largest step
    when weights are equal now.

    Args:
        log_evidence: `[..., K]`, nats at inverse temperature one; particles at -inf count as dead from the start.
        inverse_temperature: now, a number or `[...]`.
        log_weight: weights so far, `[..., K]`; None is equal ones (just resampled).
        keep: in (0, 1): ESS after >= keep · ESS of the living before. Smaller takes fewer, bolder steps.
        final: where tempering ends.

    Raises:
        ValueError: keep outside (0, 1), inverse_temperature not in [.., final], a NaN or +inf in log_evidence or
            log_weight, a population without a living particle, or evidence so large that no step above rounding keeps
            the share (tempering would never end).
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep: expected a share in (0, 1), got {keep}")
    _check("log_evidence", log_evidence)
    evidence = log_evidence.double()
    base = torch.zeros_like(evidence) if log_weight is None else log_weight.double()
    _check("log_weight", base)
    base = base.masked_fill(evidence == -math.inf, -math.inf)
    _check("log_evidence where log_weight is not -inf", base)
    evidence = evidence.masked_fill(evidence == -math.inf, 0.0)
    target = keep * effective_sample_size(base)
    low = torch.as_tensor(inverse_temperature, dtype=torch.float64, device=target.device).expand(target.shape)
    now, high = low, torch.full_like(low, final)
    if not bool((now <= final).all()):
        raise ValueError(f"inverse_temperature: expected numbers up to final = {final}, got {inverse_temperature}")

    def enough(trial: Tensor) -> Tensor:
        return effective_sample_size(base + (trial - now)[..., None] * evidence) >= target

    arrived = enough(high)
    for _ in range(60):
        middle = (low + high) / 2
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    stuck = ~arrived & (low == now)
    if bool(stuck.any()):
        where = _population(stuck.nonzero()[0].tolist())
        raise ValueError(
            f"log_evidence: {where} spans so many nats that no step of the inverse temperature from "
            f"{float(now[stuck][0])} keeps {keep} of its effective sample size; scale the evidence down, or clip it"
        )
    return torch.where(arrived, torch.full_like(low, final), low)


def _comb(log_weight: Tensor, shift: Tensor) -> Tensor:
    """Invert the cumulative weights at (k + shift_k) / K."""
    count = log_weight.shape[-1]
    ladder = log_weight.double().softmax(-1).cumsum(-1)
    teeth = (torch.arange(count, dtype=torch.float64, device=log_weight.device) + shift) / count
    teeth = (teeth * ladder[..., -1:]).clamp(max=ladder[..., -1:] * (1 - 1e-15))
    return torch.searchsorted(ladder, teeth, right=True)


def _uniform(log_weight: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    shape = (*log_weight.shape[:-1], count)
    return torch.rand(shape, dtype=torch.float64, device=log_weight.device, generator=generator)


def _check(name: str, log_weight: Tensor) -> None:
    """ValueError unless every population has a particle with weight, and no NaN or +inf."""
    if log_weight.ndim == 0 or log_weight.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., K] with K of at least 1, got shape {list(log_weight.shape)}")
    bad = log_weight.isnan() | (log_weight == math.inf)
    if bool(bad.any()):
        *population, particle = at = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: particle {particle} of {_population(population)} is {float(log_weight[tuple(at)])}; use finite "
            "numbers, or -inf for a dead particle"
        )
    dead = log_weight.amax(-1) == -math.inf
    if bool(dead.any()):
        where = _population(dead.nonzero()[0].tolist())
        raise ValueError(f"{name}: {where} holds only zero weights (-inf); no particle explains the evidence")


def _population(at: list[int]) -> str:
    return f"population {at}" if at else "the population"
