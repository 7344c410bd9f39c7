"""The shared mathematics of soft control: values, posterior weights, divergences, solvers (torch).

Short pure functions that the algorithms call; each is held to an exact answer by a test. q, advantages and values are
in the caller's units of reward, and `temperature` (units of reward per nat) is the only thing that converts. A
number is checked to be positive; a tensor, which a check would bring to the host, is taken as it is. Multi-step returns
(`td_lambda`, `gae`, `retrace`) live in `returns`, temperature duals in `temperatures`; both are offered here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from offline_cai.inference.returns import gae, retrace, td_lambda
from offline_cai.inference.temperatures import (
    check_temperature,
    cholesky,
    gaussian_temperature,
    posterior_kl,
    temperature_dual,
    temperature_for_kl,
)

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

    Raises:
        ValueError: a temperature that is not positive, or a log_prior of another kind.
    """
    check_temperature(temperature)
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

    Raises:
        ValueError: a temperature that is not positive.
    """
    check_temperature(temperature)
    return temperature * (torch.logsumexp(q / temperature + log_weight, dim) - math.log(q.shape[dim]))


def posterior_weights(
    advantage: Tensor, temperature: Tensor | float = 1.0, *, clip: float | None = None, dim: int | None = None
) -> Tensor:
    """exp(advantage / temperature), at most `clip`; with `dim`, normalised to sum to one along it.

    The ratio posterior / prior, up to a constant, of samples of the prior. Clipping is done in the exponent, so a clip
    (20 in AWR, 100 in IQL) also protects from overflow; without clip and dim, exp overflows above 88 nats in float32.

    Raises:
        ValueError: a temperature or a clip that is not positive.
    """
    check_temperature(temperature)
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
    chol, chol_p = cholesky("covariance", covariance), cholesky("covariance_p", covariance_p)
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
