"""How far from its prior a posterior is, and the temperature that spends a given number of nats (torch).

Advantages and rewards are in the caller's units; a temperature is units of reward per nat.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_BUDGET = 1e-12  # nats: a KL is a difference of numbers near one, so it has no digits below
REACH = 600.0  # log temperatures: their exp stays finite


def posterior_kl(advantage: Tensor, temperature: Tensor | float) -> Tensor:
    """KL(posterior weights ‖ uniform weights) in nats over the n samples of the last axis, `[...]`; at most log n.

    A sample at -inf has weight zero and counts among the n.

    Raises:
        ValueError: a temperature that is not positive.
    """
    check_temperature(temperature)
    log_w = (advantage / temperature).log_softmax(-1)
    finite = log_w.masked_fill(log_w == -math.inf, 0.0)  # 0 log 0 = 0, in the gradient too
    return math.log(advantage.shape[-1]) + (log_w.exp() * finite).sum(-1)


def temperature_dual(advantage: Tensor, temperature: Tensor, budget: float) -> Tensor:
    """temperature · (budget + E log mean exp(advantage / temperature)): MPO's convex dual, a scalar loss.

    advantage `[..., n]`: n samples of the prior per state; E is over the leading axes. Its derivative by temperature
    is budget - KL, so its minimum is `temperature_for_kl(advantage, budget)`.
    """
    return temperature * (
        budget + (torch.logsumexp(advantage.detach() / temperature, -1) - math.log(advantage.shape[-1])).mean()
    )


@torch.no_grad()
def temperature_for_kl(advantage: Tensor, budget: float) -> Tensor:
    """The temperature at which the posterior over n samples is `budget` nats from their prior, a float64 scalar.

    advantage `[..., n]`; with leading axes the mean over states of the KL meets the budget. Newton's method on the
    dual, in log temperature, kept inside a bracket.

    Raises:
        ValueError: a budget below 1e-12 (rounding), or that n samples cannot express (log n, less if the best ones
            tie), or an advantage that is not finite.
    """
    x = advantage.double()
    n = x.shape[-1]
    if not 0 < budget < math.log(n):
        raise ValueError(
            f"budget: {budget} nats cannot be met by {n} samples, whose posterior is less than log({n}) = "
            f"{math.log(n):.4g} nats from their prior (and more than 0); lower the budget or draw more samples"
        )
    if not x.isfinite().all():
        at = (~x.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"advantage: not finite at index {at}; drop that sample or give it a finite penalty")
    _check_budget(budget)
    unit = _unit(x)
    x = x / unit
    x = x - x.amax(-1, keepdim=True)
    most = float((math.log(n) - (x == 0).sum(-1).double().log()).mean())
    if budget >= most:
        raise ValueError(
            f"budget: {budget} nats, but the best samples tie and at most {most:.4g} nats can be expressed; lower the "
            "budget or draw more samples"
        )

    def gap_and_slope(log_temperature: float) -> tuple[float, float]:
        scaled = x * math.exp(-log_temperature)
        w = scaled.softmax(-1)
        variance = (w * scaled.square()).sum(-1) - (w * scaled).sum(-1).square()
        return float(posterior_kl(scaled, 1.0).mean()) - budget, -float(variance.mean())

    spread = float(-x.amin())
    x = x / spread
    root = spread * math.exp(_falling_root(gap_and_slope))
    return torch.tensor(unit * root, dtype=torch.float64, device=x.device)


@torch.no_grad()
def gaussian_temperature(gradient: Tensor, covariance: Tensor, budget: float, curvature: Tensor | None = None) -> float:
    """The temperature at which a Gaussian prior's posterior is `budget` nats away, in closed form.

    Prior N(m, covariance `[n, n]`), reward gradientᵀ(x - m) - ½ (x - m)ᵀ curvature (x - m). Without curvature the KL
    is gradientᵀ covariance gradient / (2 temperature²), inverted directly; with it the KL has a closed form in the
    eigenvalues of the whitened curvature, and its root is found by bisection.

    Raises:
        ValueError: a budget that is not positive (with curvature, below 1e-12 or out of reach), a covariance that is
            not positive definite, a gradient that is not finite, a curvature that is not finite and symmetric, or a
            constant reward.
    """
    if not 0 < budget < math.inf:
        raise ValueError(f"budget: expected a positive finite number of nats, got {budget}")
    chol = cholesky("covariance", covariance.double())
    if not gradient.isfinite().all():
        raise ValueError(f"gradient: not finite at index {(~gradient.isfinite()).nonzero()[0].tolist()}")
    pull = chol.T @ gradient.double()
    if curvature is None:
        if not pull.any():
            raise ValueError("gradient: zero, so the posterior is the prior at every temperature; give a reward")
        return math.sqrt(float(pull @ pull) / (2 * budget))
    _check_symmetric("curvature", curvature)
    _check_budget(budget)
    bend, basis = torch.linalg.eigh(chol.T @ curvature.double() @ chol)
    pull = basis.T @ pull
    if not (pull.any() or bend.any()):
        raise ValueError("gradient: the reward is constant, so the posterior is the prior at every temperature")
    unit = max(_unit(bend), _unit(pull))
    bend, pull = bend / unit, pull / unit

    def gap_and_slope(log_temperature: float) -> tuple[float, float]:
        beta = math.exp(-log_temperature)
        precision = 1 + beta * bend
        if bool((precision <= 0).any()):
            return math.inf, math.nan
        mean = beta * pull / precision
        return float(0.5 * (1 / precision - 1 + precision.log() + mean.square()).sum()) - budget, math.nan

    return unit * math.exp(_falling_root(gap_and_slope))


def _falling_root(gap_and_slope: Callable[[float], tuple[float, float]]) -> float:
    """The root of a falling function of the log temperature, for a reward of size one.

    Newton from 0, bisection where Newton would leave the bracket; ValueError when there is none within e^±REACH.
    """
    low = high = x = 0.0
    step = 1.0
    while gap_and_slope(low)[0] <= 0:
        low, step = low - step, 2 * step
        if low < -REACH:
            raise ValueError("budget: too large: no temperature above rounding spends it; lower the budget")
    step = 1.0
    while not gap_and_slope(high)[0] <= 0:
        high, step = high + step, 2 * step
        if high > REACH:
            raise ValueError("budget: too small: no temperature below overflow spends so little; raise the budget")
    for _ in range(200):
        gap, slope = gap_and_slope(x)
        low, high = (x, high) if gap > 0 else (low, x)
        newton = x - gap / slope if slope else math.nan
        last, x = x, newton if low <= newton <= high else (low + high) / 2
        if abs(x - last) <= 1e-14 * max(1.0, abs(x)):
            break
    return x


def _unit(x: Tensor) -> float:
    """The largest size in x, or 1 when all of it is zero."""
    return float(x.abs().max()) or 1.0


def _check_budget(budget: float) -> None:
    if budget < SMALLEST_BUDGET:
        raise ValueError(f"budget: {budget} nats is below the rounding of a KL; use at least {SMALLEST_BUDGET}")


def check_temperature(temperature: Tensor | float) -> None:
    """ValueError for a number that is not positive; tensors are not looked at."""
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive finite number, got {temperature}")


def _check_symmetric(name: str, matrix: Tensor) -> None:
    bad = ~matrix.isfinite()
    if bool(bad.any()):
        raise ValueError(f"{name}: not finite at index {bad.nonzero()[0].tolist()}")
    uneven = (matrix - matrix.mT).abs() > 1e-5 * matrix.abs().amax((-2, -1), keepdim=True)
    if bool(uneven.any()):
        at = uneven.nonzero()[0].tolist()
        raise ValueError(f"{name}: asymmetric at index {at}; use (C + C.mT) / 2")


def cholesky(name: str, covariance: Tensor) -> Tensor:
    """The lower factor, `[..., n, n]`; ValueError names the index of a covariance that is not positive definite."""
    _check_symmetric(name, covariance)
    chol, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        at = failed.nonzero()[0].tolist()
        where = f" at index {at}" if at else ""
        raise ValueError(
            f"{name}: not positive definite{where}; add a small multiple of the identity, or mend its signs"
        )
    return chol
