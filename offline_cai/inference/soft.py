"""The shared mathematics of soft control: values, posterior weights, divergences, temperatures, solvers (torch).

Short pure functions that the algorithms call; each is held to an exact answer by a test. q, advantages and values are
in the caller's units of reward, and `temperature` (units of reward per nat) is the only thing that converts.
Multi-step returns (`td_lambda`, `gae`, `retrace`) live in `returns` and are offered here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from offline_cai.inference.returns import gae, retrace, td_lambda

__all__ = [
    "conjugate_gradient",
    "decoupled_gaussian_kl",
    "diagonal_gaussian_kl",
    "gae",
    "gaussian_kl",
    "gaussian_temperature",
    "log_det_tanh",
    "posterior_kl",
    "posterior_weights",
    "retrace",
    "soft_value",
    "soft_value_from_samples",
    "squashed_gaussian_log_prob",
    "td_lambda",
    "temperature_dual",
    "temperature_for_kl",
]

# ---- values and weights


def soft_value(
    q: Tensor,
    temperature: Tensor | float = 1.0,
    log_prior: Tensor | Literal["counting"] | None = None,
    dim: int = -1,
) -> Tensor:
    """V = temperature · log Σ_a prior(a) exp(q(a) / temperature) over all actions along `dim`.

    log_prior broadcasts to q; None is the uniform prior 1/|A| (V is then at most max q), "counting" is 1 for every
    action (V is then E q + temperature · entropy under the soft-greedy policy). Haarnoja et al. 2017.
    """
    logits = q / temperature
    if isinstance(log_prior, Tensor):
        logits = logits + log_prior
    elif log_prior is None:
        logits = logits - math.log(q.shape[dim])
    elif log_prior != "counting":
        raise ValueError(f'log_prior: expected None, "counting" or log-probabilities, got {log_prior!r}')
    return temperature * torch.logsumexp(logits, dim)


def soft_value_from_samples(
    q: Tensor, temperature: Tensor | float = 1.0, log_weight: Tensor | float = 0.0, dim: int = -1
) -> Tensor:
    """V from n sampled actions: temperature · log of the mean of exp(q / temperature + log_weight) along `dim`.

    log_weight is log prior(a) - log proposal(a): 0 for samples of the prior; |A| log 2 for uniform samples of the box
    [-1, 1]^A under the counting prior. exp(V / temperature) is unbiased; V itself lies below on average (Jensen).
    """
    return temperature * (torch.logsumexp(q / temperature + log_weight, dim) - math.log(q.shape[dim]))


def posterior_weights(
    advantage: Tensor, temperature: Tensor | float = 1.0, *, clip: float | None = None, dim: int | None = None
) -> Tensor:
    """exp(advantage / temperature), at most `clip`; with `dim`, normalised to sum to one along it.

    The ratio posterior / prior, up to a constant, of samples of the prior. Clipping is done in the exponent, so a clip
    (20 in AWR, 100 in IQL) also protects from overflow; without clip and dim, exp overflows above 88 nats in float32.
    """
    log_weight = advantage / temperature
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"clip: expected a positive number, got {clip}")
        log_weight = log_weight.clamp(max=math.log(clip))
    return log_weight.exp() if dim is None else log_weight.softmax(dim)


# ---- divergences and densities


def gaussian_kl(mean: Tensor, covariance: Tensor, mean_p: Tensor, covariance_p: Tensor) -> Tensor:
    """KL(N(mean, covariance) ‖ N(mean_p, covariance_p)) in nats; means `[..., n]`, covariances `[..., n, n]`.

    Raises:
        ValueError: a covariance is not positive definite.
    """
    chol, chol_p = _cholesky("covariance", covariance), _cholesky("covariance_p", covariance_p)
    shift = torch.linalg.solve_triangular(chol_p, (mean_p - mean)[..., None], upper=False)
    ratio = torch.linalg.solve_triangular(chol_p, chol, upper=False)
    log_det = chol_p.diagonal(dim1=-2, dim2=-1).log().sum(-1) - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    square = shift.square().sum((-2, -1)) + ratio.square().sum((-2, -1))
    return 0.5 * (square - mean.shape[-1]) + log_det


def diagonal_gaussian_kl(mean: Tensor, std: Tensor, mean_p: Tensor, std_p: Tensor) -> Tensor:
    """KL(N(mean, std²) ‖ N(mean_p, std_p²)) in nats, summed over the last axis, `[...]`."""
    ratio = (std / std_p).square()
    return 0.5 * (ratio - 1 - ratio.log() + ((mean - mean_p) / std_p).square()).sum(-1)


def decoupled_gaussian_kl(mean: Tensor, std: Tensor, mean_p: Tensor, std_p: Tensor) -> tuple[Tensor, Tensor]:
    """The two trust regions of MPO's M-step, per dimension `[..., n]`, nats (Abdolmaleki et al. 2018).

    KL(old ‖ new mean with old std) and KL(old ‖ old mean with new std), for old = (mean, std), new = (mean_p, std_p).
    They sum to less than the KL to the new Gaussian where it is narrower, to more where it is wider.
    """
    ratio = (std / std_p).square()
    return 0.5 * ((mean - mean_p) / std).square(), 0.5 * (ratio - 1 - ratio.log())


def log_det_tanh(u: Tensor) -> Tensor:
    """log d tanh(u) / du = 2 (log 2 - u - softplus(-2u)), elementwise; right where 1 - tanh² rounds to zero."""
    return 2 * (math.log(2) - u - softplus(-2 * u))


def squashed_gaussian_log_prob(u: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log-density in nats of the action tanh(u), u ~ N(mean, std²), summed over the last axis (SAC, appendix C).

    Takes u, `[..., A]`, not the action: near the box's edge the action has lost it.
    """
    normal = (
        -0.5 * ((u - mean) / std).square() - torch.as_tensor(std, dtype=u.dtype).log() - 0.5 * math.log(2 * math.pi)
    )
    return (normal - log_det_tanh(u)).sum(-1)


# ---- temperatures


def posterior_kl(advantage: Tensor, temperature: Tensor | float) -> Tensor:
    """KL(posterior weights ‖ uniform weights) in nats over the n samples of the last axis, `[...]`; at most log n."""
    log_w = (advantage / temperature).log_softmax(-1)
    return math.log(advantage.shape[-1]) + (log_w.exp() * log_w).sum(-1)


def temperature_dual(advantage: Tensor, temperature: Tensor, budget: float) -> Tensor:
    """temperature · (budget + E log mean exp(advantage / temperature)): MPO's convex dual, a scalar loss.

    advantage `[..., n]`: n samples of the prior per state; E is over the leading axes. Its derivative by temperature
    is budget - KL, so its minimum is `temperature_for_kl(advantage, budget)`.
    """
    return temperature * budget + soft_value_from_samples(advantage.detach(), temperature).mean()


@torch.no_grad()
def temperature_for_kl(advantage: Tensor, budget: float) -> Tensor:
    """The temperature at which the posterior over n samples is `budget` nats from their prior, a float64 scalar.

    advantage `[..., n]`; with leading axes the mean over states of the KL meets the budget. Newton's method on the
    dual, in log temperature, kept inside a bracket.

    Raises:
        ValueError: a budget that is not positive, or that n samples cannot express (log n, less if the best ones tie).
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

    return torch.tensor(math.exp(_falling_root(gap_and_slope, math.log(float(-x.amin())))), dtype=torch.float64)


@torch.no_grad()
def gaussian_temperature(gradient: Tensor, covariance: Tensor, budget: float, curvature: Tensor | None = None) -> float:
    """The temperature at which a Gaussian prior's posterior is `budget` nats away, in closed form.

    Prior N(m, covariance `[n, n]`), reward gradientᵀ(x - m) - ½ (x - m)ᵀ curvature (x - m). Without curvature the KL
    is gradientᵀ covariance gradient / (2 temperature²), inverted directly; with it the KL has a closed form in the
    eigenvalues of the whitened curvature, and its root is found by bisection.

    Raises:
        ValueError: a budget that is not positive, a covariance that is not positive definite, or a constant reward.
    """
    if not 0 < budget < math.inf:
        raise ValueError(f"budget: expected a positive finite number of nats, got {budget}")
    chol = _cholesky("covariance", covariance.double())
    pull = chol.T @ gradient.double()
    if curvature is None:
        if not pull.any():
            raise ValueError("gradient: zero, so the posterior is the prior at every temperature; give a reward")
        return math.sqrt(float(pull @ pull) / (2 * budget))
    bend, basis = torch.linalg.eigh(chol.T @ curvature.double() @ chol)
    pull = basis.T @ pull
    if not (pull.any() or bend.any()):
        raise ValueError("gradient: the reward is constant, so the posterior is the prior at every temperature")

    def gap_and_slope(log_temperature: float) -> tuple[float, float]:
        beta = math.exp(-log_temperature)
        precision = 1 + beta * bend
        if bool((precision <= 0).any()):
            return math.inf, math.nan
        mean = beta * pull / precision
        return float(0.5 * (1 / precision - 1 + precision.log() + mean.square()).sum()) - budget, math.nan

    scale = math.log(float(torch.maximum(bend.abs().max(), pull.abs().max())))
    return math.exp(_falling_root(gap_and_slope, scale))


def _falling_root(gap_and_slope: Callable[[float], tuple[float, float]], guess: float) -> float:
    """The root of a falling function: Newton from `guess`, bisection where Newton would leave the bracket."""
    low = high = x = guess
    step = 1.0
    while gap_and_slope(low)[0] <= 0:
        low, step = low - step, 2 * step
    step = 1.0
    while gap_and_slope(high)[0] > 0:
        high, step = high + step, 2 * step
    for _ in range(200):
        gap, slope = gap_and_slope(x)
        low, high = (x, high) if gap > 0 else (low, x)
        newton = x - gap / slope if slope else math.nan
        last, x = x, newton if low <= newton <= high else (low + high) / 2
        if abs(x - last) <= 1e-14 * max(1.0, abs(x)):
            break
    return x


# ---- solvers


@torch.no_grad()
def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """x with A x = b for a positive definite A given by `product`, b `[n]`; stops at |b - A x| <= tolerance · |b|.

    Hestenes & Stiefel 1952; exact after n iterations but for rounding.

    Raises:
        ValueError: A turns out not to be positive definite.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), residual @ residual
    enough = tolerance**2 * float(square)
    for _ in range(iterations):
        if float(square) <= enough:
            break
        image = product(direction)
        bend = direction @ image
        if not float(bend) > 0:
            raise ValueError(f"product: not positive definite (vᵀAv = {float(bend):.3g}); add damping · v to it")
        step = square / bend
        x, residual = x + step * direction, residual - step * image
        square, previous = residual @ residual, square
        direction = residual + square / previous * direction
    return x


def _cholesky(name: str, covariance: Tensor) -> Tensor:
    uneven = (covariance - covariance.mT).abs() > 1e-5 * covariance.abs().amax((-2, -1), keepdim=True)
    if bool(uneven.any()):
        at = uneven.nonzero()[0].tolist()
        raise ValueError(f"{name}: asymmetric at index {at}; use (C + C.mT) / 2")
    chol, failed = torch.linalg.cholesky_ex(covariance)
    if bool(failed.any()):
        at = failed.nonzero()[0].tolist()
        where = f" at index {at}" if at else ""
        raise ValueError(
            f"{name}: not positive definite{where}; add a small multiple of the identity, or mend its signs"
        )
    return chol
