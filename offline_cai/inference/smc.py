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
        ValueError: a population whose weights are all zero, or a NaN.
    """
    _check(log_weight)
    return (2 * torch.logsumexp(log_weight, -1) - torch.logsumexp(2 * log_weight, -1)).exp()


def systematic(log_weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices `[..., K]` of a resampled population: one uniform shift of a regular comb (Kitagawa 1996).

    Particle i is copied floor or ceil of K · w_i times, and K · w_i times on average.
    """
    _check(log_weight)
    return _comb(log_weight, _uniform(log_weight, 1, generator))


def stratified(log_weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices `[..., K]` of a resampled population: one uniform draw in each of K strata (Kitagawa 1996).

    Unbiased like `systematic`, with independent draws; copies differ from K · w_i by less than 2.
    """
    _check(log_weight)
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
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep: expected a share in (0, 1), got {keep}")
    evidence = log_evidence.double()
    base = torch.zeros_like(evidence) if log_weight is None else log_weight.double()
    base = base.masked_fill(evidence == -math.inf, -math.inf)
    evidence = evidence.masked_fill(evidence == -math.inf, 0.0)
    target = keep * effective_sample_size(base)
    low = torch.as_tensor(inverse_temperature, dtype=torch.float64).expand(target.shape)
    now, high = low, torch.full_like(low, final)

    def enough(trial: Tensor) -> Tensor:
        return effective_sample_size(base + (trial - now)[..., None] * evidence) >= target

    arrived = enough(high)
    for _ in range(60):
        middle = (low + high) / 2
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
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


def _check(log_weight: Tensor) -> None:
    bad = log_weight.isnan().any(-1) | (log_weight.amax(-1) == -math.inf)
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        where = f"population {at}" if at else "the population"
        raise ValueError(f"log_weight: {where} holds a NaN or only zero weights; no particle explains the evidence")
