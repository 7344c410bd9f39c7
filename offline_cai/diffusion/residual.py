"""What a denoiser leaves open: the covariance of x_0 - D(x_k, k), averaged over data, at each level.

It is the optimal noise of a reverse step (Analytic-DPM, Bao et al. 2022, in its multivariate form), and what corrected
guidance steers with. Matrices act on rows [R, D] flattened to d = R * D numbers; r is a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError

FLOOR = 1e-10  # relative to the largest variance: a direction without variance keeps this much, so densities exist
CHUNK = 4096  # windows that are denoised at once


class Spread(NamedTuple):
    """A covariance over rows: any matrix in the span of `basis`, isotropic beside it, zero for known numbers."""

    basis: Tensor  # [d, r] or [N, d, r], orthonormal columns, zero where a number is known
    root: Tensor  # [r, r] or [N, r, r]: the covariance within the span is root · rootᵀ
    outer: Tensor  # [], the variance beside the span
    free: Tensor  # [d] or [N, d], 1.0 where a number is free, 0.0 where it is known

    @staticmethod
    def isotropic(variance: float, free: Tensor) -> Spread:
        return Spread(free.new_zeros(free.shape[-1], 0), free.new_zeros(0, 0), free.new_tensor(variance), free)

    @property
    def factor(self) -> Tensor:
        """[.., d, r]: factor · factorᵀ is the covariance within the span."""
        return self.basis @ self.root

    def matrix(self) -> Tensor:
        """The covariance [.., d, d]."""
        beside = torch.diag_embed(self.free) - self.basis @ self.basis.mT
        return self.factor @ self.factor.mT + self.outer * beside

    def scaled(self, weight: float, variance: float) -> Spread:
        """The covariance of weight · y + sqrt(variance) · eps, for y of this covariance."""
        root = weight * self.root
        if variance > 0:
            eye = torch.eye(root.shape[-1], dtype=root.dtype, device=root.device)
            root = torch.linalg.cholesky(root @ root.mT + variance * eye)
        return self._replace(root=root, outer=weight**2 * self.outer + variance)

    def draw(self, noise: Tensor) -> Tensor:
        """Standard normal noise [N, R, D] to draws of this covariance [N, R, D]."""
        flat = noise.flatten(1)
        inside = _rows(flat, self.basis)
        beside = flat * self.free - _rows(inside, self.basis.mT)
        return (_rows(inside, self.factor.mT) + self.outer.sqrt() * beside).view_as(noise)

    def log_prob(self, residual: Tensor) -> Tensor:
        """log N(residual; 0, this covariance) [N] over the free numbers, but for a constant in their count.

        Where `outer` is zero, what lies beside the span is certain and is left out.
        """
        flat = residual.flatten(1)
        inside = _rows(flat, self.basis)
        white = torch.linalg.solve(self.root, inside[..., None])[..., 0]
        total = -0.5 * white.square().sum(-1) - torch.linalg.slogdet(self.root).logabsdet
        if self.outer > 0:
            beside = flat.square().mul(self.free).sum(-1) - inside.square().sum(-1)
            count = self.free.sum(-1) - self.basis.shape[-1]
            total = total - 0.5 * (beside / self.outer + count * self.outer.log())
        return total

    def select(self, index: Tensor) -> Spread:
        """Of the particles at `index`, where the covariance is one of each particle's own."""
        basis = self.basis[index] if self.basis.ndim == 3 else self.basis
        free = self.free[index] if self.free.ndim == 2 else self.free
        return self._replace(basis=basis, root=self.root[index] if self.root.ndim == 3 else self.root, free=free)


def _rows(x: Tensor, matrix: Tensor) -> Tensor:
    """x [N, a] through matrix [a, b] or [N, a, b]."""
    return (x[:, None] @ matrix)[:, 0]


class Residual(NamedTuple):
    """Cov[x_0 - D(x_k, k)] of all levels: basis · diag(variance) · basisᵀ and `outer` beside it; see `Spread`.

    r = 0 is Analytic-DPM's one number per level, r = d the whole matrix; between them it is of low rank. `mask` tells
    which numbers were known when it was measured, `abar` at which noise: it holds for those only.
    """

    basis: Tensor  # [T, d, r], or [1, d, r]: one for all levels
    variance: Tensor  # [T, r]
    outer: Tensor  # [T]
    mask: Tensor  # [R, D] bool
    abar: Tensor  # [T], of the schedule

    def at(self, level: int) -> Spread:
        basis = self.basis[level if len(self.basis) > 1 else 0]
        free = (~self.mask).flatten().to(basis)
        return Spread(basis, torch.diag(self.variance[level].sqrt()), self.outer[level], free)

    def to(self, like: Tensor) -> Residual:
        """With the dtype and device of `like`."""
        basis, variance, outer, _, abar = (part.to(like) for part in self)
        return Residual(basis, variance, outer, self.mask.to(like.device), abar)

    def check(self, schedule: Schedule, known: Known) -> None:
        """
        Raises:
            UserError: it belongs to another schedule, other rows or other known numbers.
        """
        if len(self.outer) != schedule.levels:
            raise UserError(
                f"the residual covariance was measured on {len(self.outer)} noise levels, but this schedule has "
                f"{schedule.levels}: it belongs to another model. Measure it again (residual.measure)."
            )
        if not torch.allclose(self.abar, schedule.abar.to(self.abar), rtol=1e-4, atol=1e-7):
            raise UserError(
                "the residual covariance was measured on another noise schedule of as many levels: measure it again "
                "(residual.measure)."
            )
        if self.mask.shape != known.mask.shape[1:]:
            raise UserError(
                f"the residual covariance was measured on rows {list(self.mask.shape)}, but these are "
                f"{list(known.mask.shape[1:])}: it belongs to another codec. Measure it again (residual.measure)."
            )
        other = (known.mask != self.mask.to(known.mask.device)).nonzero()
        if len(other):
            plan, row, column = other[0].tolist()
            was, now = ("known", "free") if bool(self.mask[row, column]) else ("free", "known")
            raise UserError(
                f"the residual covariance was measured with the number in row {row}, column {column} {was}, and in "
                f"plan {plan} it is {now}: measure it for these conditions (residual.measure, or residual.wiener)."
            )


@torch.no_grad()
def measure(
    denoise: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    x: Tensor,
    mask: Tensor,
    key: Tensor,
    rank: int | None = None,
) -> Residual:
    """The residual covariance of a trained denoiser, one pass of the data x [n, R, D] through it for each level.

    Second moments about zero, so a bias of the denoiser counts as spread. Their relative error is about sqrt(2 / n) in
    each direction, sqrt(d / n) in the matrix.

    Args:
        denoise: D(x_k, k) -> x_0, bounded as it will be when sampling.
        x: rows of data in the model's space; a network that knows its training's by heart seems surer on them.
        mask: [R, D] bool, the numbers that are known, in training as in sampling.
        key: int64 [n], of the noise.
        rank: directions kept at each level, the most uncertain ones; the others share one variance. None: all of them;
            0: one number per level (Analytic-DPM).
    """
    free = ~mask.flatten()
    known = Known(x, mask.expand_as(x))
    parts = []
    for level in range(schedule.levels):
        moment = x.new_zeros(int(free.sum()), int(free.sum()), dtype=torch.float64)
        for rows in torch.arange(len(x), device=x.device).split(CHUNK):
            k = torch.full_like(rows, level)
            noise = seeding.normal(key[rows], tuple(x.shape[1:]), stream=level, dtype=x.dtype)
            noised = schedule.add_noise(x[rows], noise, k).to(x.dtype)
            imposed = Known(known.value[rows], known.mask[rows]).impose(noised)
            error = (x[rows] - denoise(imposed, k)).flatten(1)[:, free].double()
            moment += error.T @ error
        parts.append(_largest(moment / len(x), rank))
    values, vectors = (torch.stack(part) for part in zip(*parts, strict=True))
    return _residual(vectors, values, mask, schedule, x)


def wiener(covariance: Tensor, schedule: Schedule, mask: Tensor, rank: int | None = None) -> Residual:
    """The residual covariance that a perfect denoiser of Gaussian data leaves: the Wiener filter's, one basis for all.

    For Gaussian data it is exact. For large d it is the cheap stand-in for `measure`: one eigendecomposition, no pass
    through the denoiser.

    Args:
        covariance: of the data, [d, d] over flattened rows; what is in `mask` is conditioned on here.
        mask: [R, D] bool, the numbers that are known.
        rank: see `measure`.
    """
    free, wide = ~mask.flatten(), covariance.double()
    here, between = wide[free][:, free], wide[free][:, ~free]
    given = here - between @ torch.linalg.pinv(wide[~free][:, ~free], hermitian=True) @ between.T
    values, vectors = _largest(given, rank)
    abar = schedule.abar.double()[:, None]
    left = values * (1 - abar) / (abar * values + 1 - abar)
    return _residual(vectors[None], left, mask, schedule, covariance)


def _largest(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """All eigenvalues, largest first, and the eigenvectors of the first `rank`."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1), vectors.flip(-1)
    return values.clamp(min=FLOOR * float(values[0])), vectors[:, :rank]


def _residual(vectors: Tensor, values: Tensor, mask: Tensor, schedule: Schedule, like: Tensor) -> Residual:
    """Eigenvectors [.., f, r] and eigenvalues [T, f] over the f free numbers, as a `Residual` over all d."""
    free = ~mask.flatten()
    basis = vectors.new_zeros(len(vectors), len(free), vectors.shape[-1])
    basis[:, free] = vectors
    rank = vectors.shape[-1]
    outer = values[:, rank:].mean(1) if rank < values.shape[1] else values.new_zeros(len(values))
    return Residual(basis, values[:, :rank], outer, mask, schedule.abar).to(like)
