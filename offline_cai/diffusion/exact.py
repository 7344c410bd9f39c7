"""What samplers are held to: the exact denoiser of a Gaussian law, and the law that a sampler's own steps give."""

from __future__ import annotations

import torch
from torch import Tensor

from offline_cai.core import Known
from offline_cai.diffusion.residual import Residual, wiener
from offline_cai.diffusion.sampler import Denoise, Guide, ReverseVariance, bounded, unguided, walk
from offline_cai.diffusion.schedule import Schedule
from offline_cai.inference.gaussian import GaussianLaw


class ExactDenoiser:
    """E[x_0 | x_k, known] of a Gaussian law over rows [R, D], for x_k whose known numbers are imposed.

    `law.posterior(known=...).denoise` for all levels, from one eigendecomposition: float64, a matrix product a call.
    """

    def __init__(self, law: GaussianLaw, schedule: Schedule, value: Tensor | None = None, mask: Tensor | None = None):
        if value is None or mask is None:
            value, mask = torch.zeros_like(law.mean), torch.zeros_like(law.mean, dtype=torch.bool)
        self.law, self.schedule, self.value, self.mask = law.posterior(known=(value, mask)), schedule, value, mask
        values, self._basis = torch.linalg.eigh(self.law.covariance)
        values, abar = values.clamp(min=0), schedule.abar.double()[:, None]
        self._gain = abar.sqrt() * values / (abar * values + 1 - abar)

    def __call__(self, x: Tensor, k: Tensor) -> Tensor:
        mean = self.law.mean.to(x)
        away = (x - self.schedule.abar_at(k).sqrt().to(x) * mean).flatten(1) @ self._basis.to(x)
        return mean + (away * self._gain[k].to(x) @ self._basis.to(x).mT).view_as(x)

    @property
    def residual(self) -> Residual:
        """Cov[x_0 | x_k, known] of each level."""
        return wiener(self.law.covariance, self.schedule, self.mask)

    def known(self, n: int) -> Known:
        """The conditions for n plans."""
        return Known(self.value.expand(n, -1, -1), self.mask.expand(n, -1, -1))


@torch.no_grad()
def propagate(
    denoiser: Denoise,
    schedule: Schedule,
    known: Known,
    steps: int,
    eta: float = 1.0,
    *,
    reverse_variance: ReverseVariance = "posterior",
    guide: Guide = unguided,
    residual: Residual | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean [d] and covariance [d, d] of `ddim`'s samples (`clip=None`) where each of its steps is affine in x.

    That is so where the denoiser is affine and the guide's evidence quadratic. The sampler's own steps are evaluated at
    zero and at each unit vector.

    Args:
        known: the conditions of one plan, [1, R, D]; the others as in `ddim`.
    """
    size = known.value[0].numel()
    points = torch.cat([known.value.new_zeros(1, size), torch.eye(size).to(known.value)]).view(
        -1, *known.value.shape[1:]
    )
    known = Known(*(part.expand(len(points), -1, -1) for part in known))
    denoise, free = bounded(denoiser, known, None), (~known.mask[0]).flatten().to(known.value)
    mean, covariance = (known.value * known.mask)[0].flatten(), torch.diag(free)
    for step in walk(schedule, known, steps, eta, reverse_variance, residual):
        belief = guide(denoise, known.impose(points), step).posterior
        to = known.impose(step.mean(known.impose(points), belief.mean)).flatten(1)
        slope, spread = (to[1:] - to[0]).mT, step.spread(belief)
        mean = slope @ (mean * free) + to[0]
        covariance = slope @ covariance @ slope.mT
        if spread is not None:
            noise = spread.select(torch.zeros(1, dtype=torch.int64)).matrix()
            covariance = covariance + (noise[0] if noise.ndim == 3 else noise) * free * free[:, None]
    return mean, covariance


def gaussian_kl(mean: Tensor, covariance: Tensor, other: Tensor, other_covariance: Tensor) -> float:
    """KL(N(mean, covariance) ‖ N(other, other_covariance)) in nats; covariances positive definite, [d, d]."""
    chol = torch.linalg.cholesky(other_covariance)
    root = torch.linalg.solve_triangular(chol, torch.linalg.cholesky(covariance), upper=False)
    away = torch.linalg.solve_triangular(chol, (mean - other)[:, None], upper=False)
    log_det = root.diagonal().log().sum()
    return float(0.5 * (root.square().sum() + away.square().sum() - len(mean)) - log_det)
