"""Exact control as inference for linear dynamics, Gaussian behaviour and quadratic reward (torch, float64).

    s_0 ~ N(m, P)      a_t ~ N(K s_t + k, U)      s_{t+1} ~ N(A s_t + B a_t + b, W)
    p(tau | O, known) ∝ p(tau | known) · exp(reward(tau) / temperature)

The posterior over the whole trajectory is Gaussian and Markov again, found by one pass of quadratic messages,
O(horizon): `LinearGaussian(...).posterior(...)` has the methods of its prior (`GaussianLaw`): mean, covariance,
log_evidence, sample, and the exact denoiser and score of its noised trajectories. A perfect denoiser is `denoise`,
perfect guidance is `posterior.score(x_k, alpha_bar) - prior.score(x_k, alpha_bar)`.

Everything is float64, whatever is given, on the device of `state_matrix`: the CPU or CUDA, but not MPS, which has no
float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from offline_cai.inference.gaussian_law import GaussianLaw
from offline_cai.inference.quadratic import QuadraticReward, numbers, precision, tolerance

__all__ = ["GaussianLaw", "LinearGaussian", "QuadraticReward"]


class LinearGaussian(GaussianLaw):
    """The prior p(tau): a controlled linear-Gaussian process under a Gaussian behaviour.

    Every array may be a tensor or nested lists; time-varying ones have a leading H (H-1 for what leads to the next
    state). Covariances may be singular: `noise_covariance=None` is a deterministic process, and eigenvalues that are
    rounding in the dtype they were given in count as zero.

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
    ) -> None:
        if not 1 <= horizon < math.inf or horizon != int(horizon):
            raise ValueError(f"horizon: expected a whole number of at least 1, got {horizon}")
        H = int(horizon)
        A = numbers("state_matrix", state_matrix)
        device, B = A.device, numbers("action_matrix", action_matrix, A.device)
        if B.ndim not in (2, 3):
            raise ValueError(f"action_matrix: expected shape [n, m] or [H-1, n, m], got {list(B.shape)}")
        n, m = B.shape[-2:]

        def table(name: str, given: Any, rows: int | None, *shape: int) -> Tensor:
            return _table(name, given, shape, rows, device).expand(shape if rows is None else (rows, *shape))

        def factor(name: str, given: Any, rows: int | None, size: int) -> Tensor:
            root = _factor(name, _table(name, given, (size, size), rows, device), given)
            return root.expand((size, size) if rows is None else (rows, size, size))

        A, B = table("state_matrix", A, H - 1, n, n), table("action_matrix", B, H - 1, n, m)
        super().__init__(
            initial_mean=table("initial_mean", initial_mean, None, n),
            initial_factor=factor("initial_covariance", initial_covariance, None, n),
            gain=table("gain", gain, H, m, n),
            offset=table("offset", offset, H, m),
            action_factor=factor("action_covariance", action_covariance, H, m),
            dynamics=torch.cat([A, B], -1),
            drift=table("drift", drift, H - 1, n),
            noise_factor=factor("noise_covariance", noise_covariance, H - 1, n),
            log_evidence=torch.zeros((), dtype=torch.float64, device=device),
        )


def _table(name: str, given: Any, shape: tuple[int, ...], rows: int | None, device: torch.device) -> Tensor:
    """`given` as it is, `shape` or (unless rows is None) `[rows, *shape]`, float64 and finite; None is zero."""
    if given is None:
        return torch.zeros(shape, dtype=torch.float64, device=device)
    table = numbers(name, given, device)
    if tuple(table.shape) != shape and (rows is None or tuple(table.shape) != (rows, *shape)):
        wanted = f"{list(shape)}" + ("" if rows is None else f" or {[rows, *shape]}")
        raise ValueError(f"{name}: expected shape {wanted}, got {list(table.shape)}")
    bad = ~table.isfinite()
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}: {float(table[tuple(at)])} at index {at}; use finite numbers")
    return table


def _factor(name: str, covariance: Tensor, given: Any) -> Tensor:
    """L with L · Lᵀ = covariance, `[..., n, n]`, by eigenvalues; those at the rounding level of `given` count as zero.

    Rounding each entry by a relative eps moves the eigenvalue of v by at most n · eps · Σ_i v_i² covariance_ii.
    """
    size = covariance.abs().amax((-2, -1), keepdim=True)
    uneven = (covariance - covariance.mT).abs() > tolerance(given) * size
    if uneven.any():
        at = uneven.nonzero()[0].tolist()
        raise ValueError(f"{name}: asymmetric at index {at}; use (C + C.T) / 2")
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    size = size[..., 0]
    negative = values < -tolerance(given) * size
    if negative.any():
        at = negative.nonzero()[0].tolist()
        place = f" at row {at[0]}" if len(at) > 1 else ""
        raise ValueError(
            f"{name}: indefinite{place}, with eigenvalue {float(values[tuple(at)]):.3g}; a covariance has none below "
            "zero: check the signs, or clip its eigenvalues at zero"
        )
    reach = (vectors.square() * covariance.diagonal(dim1=-2, dim2=-1)[..., None]).sum(-2)
    rounding = values.shape[-1] * torch.maximum(torch.finfo(values.dtype).eps * size, 4 * precision(given) * reach)
    return vectors * torch.where(values > rounding, values, 0.0).sqrt()[..., None, :]
