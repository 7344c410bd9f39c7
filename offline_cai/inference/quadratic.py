"""Quadratic rewards, and the quadratic messages that a linear-Gaussian process passes backward in time (torch).

    V(y) = -½ yᵀS y + yᵀs + c    on the plane  C y = d        nats

The plane carries exactly known numbers. Integrating noise out keeps the form, with covariances that may be singular
(no noise at all included), because noise enters through a factor: y + L e with e ~ N(0, I).
Vectors `s` and scalars `c` may have leading batch dimensions; matrices and the plane have none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

F64 = torch.float64
ROUNDING = 1e-11  # relative size below which a direction of a known plane counts as absent
CONTRADICTION = 1e-7  # relative distance from a known plane that counts as impossible


def numbers(name: str, given: Any, device: torch.device | None = None) -> Tensor:
    """Nested lists, an array or a tensor as float64; ValueError names it when it is no array of numbers."""
    if device is None and isinstance(given, Tensor):
        device = given.device
    try:
        return torch.as_tensor(given, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected an array of numbers with rows of one length ({error})") from None


def precision(given: Any) -> float:
    """The relative rounding step of numbers as they were given: that of their dtype, float64's for lists."""
    dtype = getattr(torch, str(getattr(given, "dtype", F64)).removeprefix("torch."), F64)
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return torch.finfo(dtype if floating else F64).eps


def tolerance(given: Any) -> float:
    """The relative asymmetry or negative eigenvalue that rounding explains."""
    return min(max(1e-9, 100 * precision(given)), 1e-3)


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

    def over(self, horizon: int, dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """weight `[H, D, D]`, linear `[H, D]` and the constant, checked, float64; ValueError names what is wrong."""
        shapes = {"weight": (horizon, dim, dim), "linear": (horizon, dim)}
        parts = []
        for name, shape in shapes.items():
            given = getattr(self, name)
            empty = given is None
            table = torch.zeros(shape, dtype=F64, device=device) if empty else numbers(f"reward: {name}", given, device)
            if tuple(table.shape) not in (shape, shape[1:]):
                wanted = f"{list(shape)} or {list(shape[1:])}"
                raise ValueError(f"reward: {name} has shape {list(table.shape)}, expected {wanted}")
            parts.append(table.expand(shape))
        uneven = (parts[0] - parts[0].mT).abs() > tolerance(self.weight) * parts[0].abs().amax()
        for name, bad in (("weight", ~parts[0].isfinite()), ("linear", ~parts[1].isfinite()), ("weight", uneven)):
            if bad.any():
                at = bad.nonzero()[0].tolist()
                raise ValueError(f"reward: {name} is not finite and symmetric at index {at}; mend that entry")
        constant = numbers("reward: constant", self.constant, device)
        if not constant.isfinite().all():
            raise ValueError(f"reward: constant is {self.constant}; use a finite number")
        return parts[0], parts[1], constant

    def __call__(self, x: Tensor) -> Tensor:
        """The reward of trajectories x `[..., H, D]`, `[...]`."""
        weight, linear, constant = (part.to(x.dtype) for part in self.over(x.shape[-2], x.shape[-1], x.device))
        moved = torch.einsum("tij,...tj->...ti", weight, x)
        return ((linear - 0.5 * moved) * x).sum((-2, -1)) + constant


class Quadratic(NamedTuple):
    """A message over y: S `[n, n]`, s `[..., n]`, c `[...]`, known plane C `[k, n]`, d `[k]`.

    size is the largest number that d was made of, so it tells a contradiction from rounding.
    """

    S: Tensor
    s: Tensor
    c: Tensor
    C: Tensor
    d: Tensor
    size: float = 0.0

    def __call__(self, y: Tensor) -> Tensor:
        """V(y) for y `[..., n]`, leaving the plane aside."""
        return -0.5 * (y @ self.S * y).sum(-1) + (y * self.s).sum(-1) + self.c

    def pull(self, F: Tensor, f: Tensor) -> Quadratic:
        """The message over z where y = F z + f."""
        c, d, size = self(f), self.d, self.size
        if len(d):
            d, size = d - self.C @ f, max(size, float(f.abs().max()))
        return Quadratic(F.T @ self.S @ F, (self.s - f @ self.S) @ F, c, self.C @ F, d, size)

    def plus(self, S: Tensor, s: Tensor, c: Tensor | float = 0.0) -> Quadratic:
        """Evidence added: -½ yᵀS y + yᵀs + c."""
        return self._replace(S=self.S + S, s=self.s + s, c=self.c + c)

    def known(self, mask: Tensor, value: Tensor) -> Quadratic:
        """The coordinates in `mask` `[n]` pinned to `value` `[n]`; c then counts their density."""
        rows = _eye(self.S)[mask]
        size = max(self.size, float(value[mask].abs().max())) if len(rows) else self.size
        return self._replace(C=torch.cat([rows, self.C]), d=torch.cat([value[mask], self.d]), size=size)


class Noise(NamedTuple):
    """The law of y + L e given y and the evidence: N(T y + t, factor · factorᵀ); t may be batched."""

    T: Tensor
    t: Tensor
    factor: Tensor


def nothing(n: int, like: Tensor) -> Quadratic:
    """The message V = 0 over n coordinates, nothing known, with the dtype and device of `like`."""
    empty = like.new_zeros(0, n)
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
    negligible = ROUNDING * torch.linalg.matrix_norm(L)
    rank = int((sigma > negligible).sum())
    R = U[:, :rank].T / sigma[:rank, None]
    lift = L @ Vh[:rank].T @ R
    P, p = _eye(lift @ C) - lift @ C, lift @ d  # y + L e = P y + p + (free noise)
    free = L @ Vh[rank:].T
    free = torch.where(torch.linalg.matrix_norm(free) > negligible, free, 0.0)  # rounding is not noise
    soft, noise = _integrate(message, free, where)
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
    unmoved = Noise(_eye(message.S), L.new_zeros(len(L)), L)
    return message._replace(c=message.c - 0.5 * (L * (message.S @ L)).sum()), unmoved


def settle(message: Quadratic, y: Tensor, where: str) -> Tensor:
    """V(y), `[...]`; ValueError when y contradicts what is known."""
    message = _tidy(message, where)
    if len(message.d):
        _no_contradiction(message.d - message.C @ y, max(message.size, float(y.abs().max())), where)
    return message(y)


def _integrate(message: Quadratic, L: Tensor, where: str) -> tuple[Quadratic, Noise]:
    """`soften` with the plane left aside; e given y is N(M^-1 L'(s - S y), M^-1) with M = I + L'SL."""
    S, s = message.S, message.s
    bend = L.T @ S @ L
    chol, failed = torch.linalg.cholesky_ex(_eye(bend) + bend)
    if failed:
        raise ValueError(
            f"reward: the log-partition is infinite at {where}: I + L'SL is not positive definite (L the factor of the "
            "noise, S the curvature of the cost to go), the breakdown of risk-sensitive (LEQG) control; raise the "
            "temperature, or make the reward's weight positive semi-definite"
        )
    factor = torch.linalg.solve_triangular(chol.T, L, upper=True, left=False)
    covariance = factor @ factor.T
    T = _eye(S) - covariance @ S
    K = torch.linalg.solve_triangular(chol.T, factor.T @ S, upper=True)
    c = message.c + 0.5 * (s @ covariance * s).sum(-1) - chol.diagonal().log().sum()
    softened = message._replace(S=T.T @ S @ T + K.T @ K, s=s @ T, c=c)  # Joseph's form: no cancellation
    return softened, Noise(T, s @ covariance, factor)


def _tidy(message: Quadratic, where: str) -> Quadratic:
    """The plane's rows scaled to length one, without those that say nothing (0 = 0) or repeat the others.

    Of repeated knowledge c counts the density in an orthonormal basis of the plane. Rows that are independent already
    are left as they are, which keeps their digits.
    """
    if not len(message.d):
        return message
    length = message.C.norm(dim=1)
    told = length > ROUNDING
    _no_contradiction(message.d[~told], message.size, where)
    length = length[told]
    C, d, c = message.C[told] / length[:, None], message.d[told] / length, message.c - length.log().sum()
    if len(d):
        U, sigma, Vh = torch.linalg.svd(C)
        rank = int((sigma > ROUNDING * sigma[0]).sum())
        if rank < len(d):
            turned = U.T @ d
            _no_contradiction(turned[rank:], max(message.size, float(d.abs().max())), where)
            C, d, c = Vh[:rank], turned[:rank] / sigma[:rank], c - sigma[:rank].log().sum()
    return message._replace(C=C, d=d, c=c)


def _no_contradiction(residual: Tensor, size: float, where: str) -> None:
    """ValueError when what should be zero is not, next to the size of the numbers that it was computed from."""
    if len(residual) and residual.abs().max() > CONTRADICTION * size:
        raise ValueError(
            f"known: impossible evidence, p = 0: the known values contradict the process at {where} (off by "
            f"{float(residual.abs().max()):.3g}); make them reachable, or give the process noise in that direction"
        )


def _eye(like: Tensor) -> Tensor:
    """The identity with the size, dtype and device of a square matrix."""
    return torch.eye(len(like), dtype=like.dtype, device=like.device)
