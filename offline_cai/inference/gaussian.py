"""Exact control as inference for linear dynamics, Gaussian behaviour and quadratic reward (torch, float64 by default).

    s_0 ~ N(m, P)      a_t ~ N(K s_t + k, U)      s_{t+1} ~ N(A s_t + B a_t + b, W)
    p(tau | O, known) ∝ p(tau | known) · exp(reward(tau) / temperature)

The posterior over the whole trajectory is Gaussian and Markov again, found by one pass of quadratic messages,
O(horizon): `LinearGaussian(...).posterior(...)` has the methods of its prior (`GaussianLaw`): mean, covariance,
log_evidence, sample, and the exact denoiser and score of its noised trajectories. A perfect denoiser is `denoise`,
perfect guidance is `posterior.score(x_k, alpha_bar) - prior.score(x_k, alpha_bar)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offline_cai.inference.gaussian_law import GaussianLaw
from offline_cai.inference.quadratic import QuadraticReward

__all__ = ["GaussianLaw", "LinearGaussian", "QuadraticReward"]


class LinearGaussian(GaussianLaw):
    """The prior p(tau): a controlled linear-Gaussian process under a Gaussian behaviour.

    Every array may be a tensor or nested lists; time-varying ones have a leading H (H-1 for what leads to the next
    state). Covariances may be singular: `noise_covariance=None` is a deterministic process.

    Args:
        state_matrix: A, `[n, n]` or `[H-1, n, n]`.
        action_matrix: B, `[n, m]` or `[H-1, n, m]`.
        horizon: H, the number of rows x_t = [s_t, a_t].
        initial_mean: m, `[n]`.   initial_covariance: P, `[n, n]`.
        action_covariance: U, `[m, m]` or `[H, m, m]`.
        noise_covariance: W, `[n, n]` or `[H-1, n, n]`.   drift: b, `[n]` or `[H-1, n]`.
        gain: K, `[m, n]` or `[H, m, n]`.   offset: k, `[m]` or `[H, m]`.

    Raises:
        ValueError: a wrong shape, a number that is not finite, a covariance that is asymmetric or indefinite.
    """

    def __init__(
        self,
        state_matrix: Any,
        action_matrix: Any,
        *,
        horizon: int,
        initial_mean: Any,
        initial_covariance: Any,
        action_covariance: Any,
        noise_covariance: Any = None,
        drift: Any = None,
        gain: Any = None,
        offset: Any = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if horizon < 1 or horizon != int(horizon):
            raise ValueError(f"horizon: expected a whole number of at least 1, got {horizon}")
        n, m = torch.as_tensor(action_matrix, dtype=dtype).shape[-2:]

        def table(name: str, given: Any, rows: int | None, *shape: int) -> Tensor:
            return _table(name, given, rows, shape, dtype)

        A, B = (
            table("state_matrix", state_matrix, horizon - 1, n, n),
            table("action_matrix", action_matrix, horizon - 1, n, m),
        )
        super().__init__(
            initial_mean=table("initial_mean", initial_mean, None, n),
            initial_factor=_factor("initial_covariance", table("initial_covariance", initial_covariance, None, n, n)),
            gain=table("gain", gain, horizon, m, n),
            offset=table("offset", offset, horizon, m),
            action_factor=_factor("action_covariance", table("action_covariance", action_covariance, horizon, m, m)),
            dynamics=torch.cat([A, B], -1),
            drift=table("drift", drift, horizon - 1, n),
            noise_factor=_factor("noise_covariance", table("noise_covariance", noise_covariance, horizon - 1, n, n)),
            log_evidence=torch.zeros((), dtype=dtype),
        )


def _table(name: str, given: Any, rows: int | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`given` as `[rows, *shape]` (`shape` when rows is None); None is zero."""
    full = shape if rows is None else (rows, *shape)
    if given is None:
        return torch.zeros(full, dtype=dtype)
    table = torch.as_tensor(given, dtype=dtype)
    if tuple(table.shape) not in (shape, full):
        wanted = f"{list(shape)}" + ("" if rows is None else f" or {list(full)}")
        raise ValueError(f"{name}: expected shape {wanted}, got {list(table.shape)}")
    bad = ~table.isfinite()
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: {float(table[tuple(at)])} at index {at}; use finite numbers")
    return table.expand(full)


def _factor(name: str, covariance: Tensor) -> Tensor:
    """L with L · Lᵀ = covariance, `[..., n, n]`, by eigenvalues; those at rounding level count as zero."""
    size = covariance.abs().amax((-2, -1), keepdim=True)
    uneven = (covariance - covariance.mT).abs() > 1e-9 * size
    if uneven.any():
        at = uneven.nonzero()[0].tolist()
        raise ValueError(f"{name}: asymmetric at index {at}; use (C + C.T) / 2")
    values, vectors = torch.linalg.eigh(covariance)
    negative = values < -1e-9 * size[..., 0]
    if negative.any():
        at = negative.nonzero()[0].tolist()
        place = f" at row {at[0]}" if len(at) > 1 else ""
        raise ValueError(
            f"{name}: indefinite{place}, with eigenvalue {float(values[tuple(at)]):.3g}; a covariance has none below "
            "zero: check the signs, or clip its eigenvalues at zero"
        )
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps * size[..., 0]
    return vectors * torch.where(values > rounding, values, 0.0).sqrt()[..., None, :]
