"""Quadratic rewards, and the quadratic messages that a linear-Gaussian process passes backward in time (torch).

    V(y) = -½ yᵀS y + yᵀs + c    on the plane  C y = d        nats

The plane carries exactly known numbers. Integrating noise out keeps the form, with covariances that may be singular
(no noise at all included), because noise enters through a factor: y + L e with e ~ N(0, I).
Vectors `s` and scalars `c` may have leading batch dimensions; matrices and the plane have none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-11  # relative size below which a direction of a known plane counts as absent
CONTRADICTION = 1e-7  # relative distance from a known plane that counts as impossible


class QuadraticReward(NamedTuple):
    """Σ_t -½ x_tᵀ weight_t x_t + linear_tᵀ x_t, plus a constant; None is zero.

    weight: `[D, D]` or `[H, D, D]`, symmetric, positive semi-definite for a cost; it may be indefinite as long as the
    log-partition stays finite. linear: `[D]` or `[H, D]`.
    """

    weight: Tensor | None = None
    linear: Tensor | None = None
    constant: float = 0.0

    @staticmethod
    def toward(target: Tensor, weight: Tensor) -> QuadraticReward:
        """Σ_t -½ (x_t - target_t)ᵀ weight_t (x_t - target_t), for target `[H, D]`."""
        pull = (weight @ target[..., None])[..., 0]
        return QuadraticReward(weight, pull, -0.5 * float((pull * target).sum()))

    def over(self, horizon: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """weight `[H, D, D]`, linear `[H, D]` and the constant, checked."""
        shapes = {"weight": (horizon, dim, dim), "linear": (horizon, dim)}
        parts = []
        for name, shape in shapes.items():
            given = getattr(self, name)
            table = torch.zeros(shape, dtype=dtype) if given is None else torch.as_tensor(given, dtype=dtype)
            if tuple(table.shape) not in (shape, shape[1:]):
                wanted = f"{list(shape)} or {list(shape[1:])}"
                raise ValueError(f"reward: {name} has shape {list(table.shape)}, expected {wanted}")
            parts.append(table.expand(shape))
        uneven = (parts[0] - parts[0].mT).abs() > 1e-9 * parts[0].abs().amax()
        for name, bad in (("weight", ~parts[0].isfinite()), ("linear", ~parts[1].isfinite()), ("weight", uneven)):
            if bad.any():
                at = bad.nonzero()[0].tolist()
                raise ValueError(f"reward: {name} is not finite and symmetric at index {at}; mend that entry")
        return parts[0], parts[1], torch.tensor(self.constant, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The reward of trajectories x `[..., H, D]`, `[...]`."""
        weight, linear, constant = self.over(x.shape[-2], x.shape[-1], x.dtype)
        moved = torch.einsum("tij,...tj->...ti", weight, x)
        return ((linear - 0.5 * moved) * x).sum((-2, -1)) + constant


class Quadratic(NamedTuple):
    """A message over y: S `[n, n]`, s `[..., n]`, c `[...]`, known plane C `[k, n]`, d `[k]`."""

    S: Tensor
    s: Tensor
    c: Tensor
    C: Tensor
    d: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        """V(y) for y `[..., n]`, leaving the plane aside."""
        return -0.5 * (y @ self.S * y).sum(-1) + (y * self.s).sum(-1) + self.c

    def pull(self, F: Tensor, f: Tensor) -> Quadratic:
        """The message over z where y = F z + f."""
        c = self(f)
        d = self.d - self.C @ f if len(self.d) else self.d
        return Quadratic(F.T @ self.S @ F, (self.s - f @ self.S) @ F, c, self.C @ F, d)

    def plus(self, S: Tensor, s: Tensor, c: Tensor | float = 0.0) -> Quadratic:
        """Evidence added: -½ yᵀS y + yᵀs + c."""
        return self._replace(S=self.S + S, s=self.s + s, c=self.c + c)

    def known(self, mask: Tensor, value: Tensor) -> Quadratic:
        """The coordinates in `mask` `[n]` pinned to `value` `[n]`; c then counts their density."""
        rows = torch.eye(len(mask), dtype=self.S.dtype)[mask]
        return self._replace(C=torch.cat([rows, self.C]), d=torch.cat([value[mask], self.d]))


class Noise(NamedTuple):
    """The law of y + L e given y and the evidence: N(T y + t, factor · factorᵀ); t may be batched."""

    T: Tensor
    t: Tensor
    factor: Tensor


def nothing(n: int, dtype: torch.dtype) -> Quadratic:
    """The message V = 0 over n coordinates, nothing known."""
    empty = torch.zeros(0, n, dtype=dtype)
    return Quadratic(empty.T @ empty, empty.sum(0), empty.sum(), empty, empty.sum(1))


def soften(message: Quadratic, L: Tensor, where: str) -> tuple[Quadratic, Noise]:
    """log E exp V(y + L e) with e ~ N(0, I), and the law of the noise given the evidence.

    What is known first spends the noise that it determines, e = R (d - C y) + (free noise); the rest is integrated out.

    Raises:
        ValueError: the log-partition is infinite, or a known value cannot occur; `where` names the place.
    """
    message = _tidy(message, where)
    C, d = message.C, message.d
    if not len(d):
        return _integrate(message, L, where)
    U, sigma, Vh = torch.linalg.svd(C @ L)
    rank = int((sigma > ROUNDING * torch.linalg.matrix_norm(L)).sum())
    R = U[:, :rank].T / sigma[:rank, None]
    lift = L @ Vh[:rank].T @ R
    P, p = torch.eye(len(L), dtype=L.dtype) - lift @ C, lift @ d  # y + L e = P y + p + (free noise)
    soft, noise = _integrate(message, L @ Vh[rank:].T, where)
    RC, Rd = R @ C, R @ d
    log_density = -0.5 * Rd @ Rd - sigma[:rank].log().sum() - 0.5 * rank * math.log(2 * math.pi)
    soft = soft.pull(P, p).plus(RC.T @ RC, Rd @ RC, log_density)
    rest = U[:, rank:].T
    return soft._replace(C=rest @ C, d=rest @ d), Noise(noise.T @ P, p @ noise.T.T + noise.t, noise.factor)


def expect(message: Quadratic, L: Tensor, where: str) -> tuple[Quadratic, Noise]:
    """E V(y + L e) with e ~ N(0, I): the variational backup, which leaves the noise as it is.

    Raises:
        ValueError: something known depends on this noise, so no policy can promise it.
    """
    message = _tidy(message, where)
    if len(message.d) and (message.C @ L).abs().max() > ROUNDING * torch.linalg.matrix_norm(L):
        raise ValueError(
            f"known: a known value depends on {where}, which the variational backup leaves as it is, so no policy can "
            'promise it; use backup="posterior", or keep only the first state known'
        )
    unmoved = Noise(torch.eye(len(L), dtype=L.dtype), torch.zeros(len(L), dtype=L.dtype), L)
    return message._replace(c=message.c - 0.5 * (L * (message.S @ L)).sum()), unmoved


def settle(message: Quadratic, y: Tensor, where: str) -> Tensor:
    """V(y), `[...]`; ValueError when y contradicts what is known."""
    message = _tidy(message, where)
    if len(message.d):
        _no_contradiction(message.d - message.C @ y, message.d, where)
    return message(y)


def _integrate(message: Quadratic, L: Tensor, where: str) -> tuple[Quadratic, Noise]:
    """`soften` with the plane left aside; e given y is N(M^-1 L'(s - S y), M^-1) with M = I + L'SL."""
    S, s = message.S, message.s
    chol, failed = torch.linalg.cholesky_ex(torch.eye(L.shape[1], dtype=L.dtype) + L.T @ S @ L)
    if failed:
        raise ValueError(
            f"reward: the log-partition is infinite at {where}: I + L'SL is not positive definite (L the factor of the "
            "noise, S the curvature of the cost to go), the breakdown of risk-sensitive (LEQG) control; raise the "
            "temperature, or make the reward's weight positive semi-definite"
        )
    factor = torch.linalg.solve_triangular(chol.T, L, upper=True, left=False)
    covariance = factor @ factor.T
    T = torch.eye(len(S), dtype=S.dtype) - covariance @ S
    K = torch.linalg.solve_triangular(chol.T, factor.T @ S, upper=True)
    c = message.c + 0.5 * (s @ covariance * s).sum(-1) - chol.diagonal().log().sum()
    softened = message._replace(S=T.T @ S @ T + K.T @ K, s=s @ T, c=c)  # Joseph's form: no cancellation
    return softened, Noise(T, s @ covariance, factor)


def _tidy(message: Quadratic, where: str) -> Quadratic:
    """The plane's rows scaled to length one, and those that say nothing (0 = 0) dropped."""
    if not len(message.d):
        return message
    length = message.C.norm(dim=1)
    told = length > ROUNDING
    _no_contradiction(message.d[~told], message.d, where)
    length = length[told]
    return message._replace(
        C=message.C[told] / length[:, None], d=message.d[told] / length, c=message.c - length.log().sum()
    )


def _no_contradiction(residual: Tensor, scale: Tensor, where: str) -> None:
    if len(residual) and residual.abs().max() > CONTRADICTION * max(1.0, float(scale.abs().max())):
        raise ValueError(
            f"known: impossible evidence, p = 0: the known values contradict the process at {where} (off by "
            f"{float(residual.abs().max()):.3g}); make them reachable, or give the process noise in that direction"
        )
