"""Samplers of the reverse process. Each is one function, named after its paper's algorithm.

They take a denoiser D(x_k, k) -> x_0 and impose the known rows at every level, as the denoiser was trained. A guide
(`guidance.py`) may replace what is believed of x_0 at each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Known
from offline_cai.diffusion.residual import Residual, Spread
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError

ReverseVariance = Literal["posterior", "beta", "analytic"]
Denoise = Callable[[Tensor, Tensor], Tensor]
"""x_k [N, R, D] and levels [N] to x_0 [N, R, D]: a `core.Denoiser` whose condition, if any, is given."""


class Belief(NamedTuple):
    """N(mean, spread) over x_0, given x_k; without a spread, its mean alone."""

    mean: Tensor  # [N, R, D]
    spread: Spread | None = None


class Guided(NamedTuple):
    """What a guide makes of x_k: the denoiser's belief, and the belief and the worth of x_k given the evidence."""

    prior: Belief | None  # None: the guide did not ask the denoiser at x_k itself
    posterior: Belief
    log_evidence: Tensor  # [N] nats, the guide's estimate of log E[exp(evidence of x_0) | x_k]


class Step(NamedTuple):
    """A reverse step x_next ~ q(x_next | x, x_0) from `level` to `following` (DDIM: Song et al. 2021, equation 7)."""

    number: int
    level: int
    following: int  # -1 is clean data
    abar: float
    abar_next: float
    direction: float  # of the noise that x seems to hold in the mean of x_next
    variance: float  # of x_next given x and x_0
    posterior_variance: float  # DDPM's, whatever `variance` is
    eta: float  # of DDIM: 1 is DDPM, 0 the ordinary differential equation
    analytic: bool  # whether the spread of x_0 goes into the noise
    residual: Spread | None
    known: Known

    @property
    def k(self) -> Tensor:
        """The level, [N]."""
        return torch.tensor(self.level, device=self.known.value.device).expand(len(self.known.value))

    @property
    def clean(self) -> float:
        """The weight of x_0 in the mean of x_next."""
        return math.sqrt(self.abar_next) - self.direction * math.sqrt(self.abar / (1 - self.abar))

    def mean(self, x: Tensor, clean: Tensor) -> Tensor:
        """E[x_next | x, x_0 = clean], [N, R, D]."""
        return torch.add(self.clean * clean, x, alpha=self.direction / math.sqrt(1 - self.abar))

    def spread(self, belief: Belief) -> Spread | None:
        """The covariance of x_next given x, under what is believed of x_0; None for none."""
        if self.analytic and belief.spread is not None:
            return belief.spread.scaled(self.clean, self.variance)
        if self.variance == 0:
            return None
        return Spread.isotropic(self.variance, (~self.known.mask).flatten(1).to(self.known.value))


Guide = Callable[[Denoise, Tensor, Step], Guided]
"""The denoiser, x_k [N, R, D] and the step to a belief about x_0: a function of `guidance.py`, with its evidence."""


def unguided(denoise: Denoise, x: Tensor, step: Step) -> Guided:
    """The denoiser's own belief: no evidence."""
    belief = Belief(denoise(x, step.k), step.residual)
    return Guided(belief, belief, x.new_zeros(len(x)))


class Warm(NamedTuple):
    """Where a sampler begins instead of at noise alone: rows, noised to a share of the levels."""

    x: Tensor  # [N, R, D]
    share: float


def levels_of(schedule: Schedule, steps: int, share: float = 1.0) -> list[int]:
    """`steps` levels down to clean data, evenly spaced ("trailing" spacing), from the top or from a share of them.

    Raises:
        UserError: more steps than levels, or none.
    """
    levels = max(round(schedule.levels * share), 1)
    if not 1 <= steps <= levels:
        raise UserError(f"{steps} sampling steps were asked for, and there are {levels} levels: take 1 to that.")
    return [round(levels * (1 - i / steps)) - 1 for i in range(steps)]


def walk(
    schedule: Schedule,
    known: Known,
    steps: int,
    eta: float = 1.0,
    reverse_variance: ReverseVariance = "posterior",
    residual: Residual | None = None,
    share: float = 1.0,
) -> Iterator[Step]:
    """The reverse steps of a sampler, from noise to clean data.

    `reverse_variance` is the noise that a step adds. `posterior` is the variance of x_next given x and x_0, times eta²;
    `beta` is the forward process's own, for eta 1 (both: Ho et al. 2020, section 3.2); `analytic` adds to the first
    what the residual covariance says of x_0, which is the optimum (Bao et al. 2022, theorem 1) and exact for Gaussian
    data at any eta. The last step is free of noise but for `analytic`.

    Raises:
        UserError: the residual covariance is missing, or belongs to other rows, levels or conditions; beta with less
            noise than DDPM.
    """
    if reverse_variance not in ("posterior", "beta", "analytic"):
        raise UserError(f"reverse_variance is {reverse_variance!r}; take posterior, beta or analytic.")
    if reverse_variance == "beta" and eta != 1:
        raise UserError(
            f"reverse_variance beta is the noise of ddpm's steps, but eta is {eta}: set eta to 1, or posterior."
        )
    if reverse_variance == "analytic" and residual is None:
        raise UserError("reverse_variance is analytic, but no residual covariance is given: see residual.measure.")
    if residual is not None:
        residual.check(schedule, known)
        residual = residual.to(known.value)
    levels, abar = levels_of(schedule, steps, share), schedule.ends.cpu().numpy()
    for number, (level, following) in enumerate(zip(levels, [*levels[1:], -1], strict=True)):
        a, b = abar[level], abar[following]
        posterior = (1 - b) / (1 - a) * (1 - a / b)
        variance = (eta * np.sqrt(posterior)) ** 2
        direction = np.sqrt(np.maximum(1 - b - variance, 0))
        if reverse_variance == "beta" and following >= 0:
            variance = 1 - a / b
        analytic = reverse_variance == "analytic"
        left = None if residual is None else residual.at(level)
        a, b, direction, variance, posterior = map(float, (a, b, direction, variance, posterior))
        yield Step(number, level, following, a, b, direction, variance, posterior, eta, analytic, left, known)


def bounded(denoiser: Denoise, known: Known, clip: float | None) -> Denoise:
    """The denoiser with its estimate within [-clip, clip] and the known numbers as they are known."""

    def denoise(x: Tensor, k: Tensor) -> Tensor:
        clean = denoiser(x, k)
        return known.impose(clean if clip is None else clean.clamp(-clip, clip))

    return denoise


def first_noise(known: Known, key: Tensor, scale: float = 1.0) -> Tensor:
    """x at the highest level, [N, R, D]."""
    return known.impose(scale * seeding.normal(key, tuple(known.value.shape[1:]), dtype=known.value.dtype))


@torch.no_grad()
def ddim(
    denoiser: Denoise,
    schedule: Schedule,
    known: Known,
    key: Tensor,
    steps: int,
    eta: float = 0.0,
    clip: float | None = 1.0,
    trace: list[Tensor] | None = None,
    *,
    reverse_variance: ReverseVariance = "posterior",
    guide: Guide = unguided,
    residual: Residual | None = None,
    warm: Warm | None = None,
    noise: float = 1.0,
) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16): rows [N, R, D] in the model's space.

    Args:
        known: conditions [N, R, D].
        key: int64 [N]; all noise of a plan is a function of its key.
        steps: denoising steps, each one call of the denoiser.
        eta: 0 is deterministic given the first noise; 1 has the variance of DDPM's posterior.
        clip: bound on the estimate of x_0, None for no bound.
        trace: if given, the first noise and x after each step are appended to it.
        reverse_variance: see `walk`.
        guide: replaces what is believed of x_0 at each step; see `guidance.py`.
        residual: the denoiser's residual covariance, for the guides and the variance that need it.
        warm: begin at these rows, noised to a share of the levels, and take that share of the steps.
        noise: scale of all noise, the first and that of the steps; 0 begins at the prior's mean and adds none.
    """
    x, denoise, share = first_noise(known, key, noise), bounded(denoiser, known, clip), 1.0
    if warm is not None:
        share, steps = warm.share, max(round(steps * warm.share), 1)
        top = x.new_full((len(x),), levels_of(schedule, steps, share)[0], dtype=torch.int64)
        x = known.impose(schedule.add_noise(warm.x, x, top))
    if trace is not None:
        trace.append(x)
    for step in walk(schedule, known, steps, eta, reverse_variance, residual, share):
        belief = guide(denoise, x, step).posterior
        spread = step.spread(belief)
        x = step.mean(x, belief.mean)
        if spread is not None:
            fresh = seeding.normal(key, tuple(x.shape[1:]), stream=step.number + 1, dtype=x.dtype)
            x = x + noise * spread.draw(fresh)
        x = known.impose(x)
        if trace is not None:
            trace.append(x)
    return x


def ddpm(
    denoiser: Denoise,
    schedule: Schedule,
    known: Known,
    key: Tensor,
    clip: float | None = 1.0,
    trace: list[Tensor] | None = None,
    *,
    steps: int | None = None,
    reverse_variance: ReverseVariance = "posterior",
    guide: Guide = unguided,
    residual: Residual | None = None,
    warm: Warm | None = None,
    noise: float = 1.0,
) -> Tensor:
    """DDPM (Ho et al. 2020, algorithm 2): rows [N, R, D]; one step per level, or fewer.

    It is DDIM at eta = 1 (Song et al. 2021, section 4.1). Arguments as in `ddim`.
    """
    steps = schedule.levels if steps is None else steps
    options: dict[str, Any] = {"reverse_variance": reverse_variance, "guide": guide, "residual": residual}
    return ddim(denoiser, schedule, known, key, steps, 1.0, clip, trace, warm=warm, noise=noise, **options)


@torch.no_grad()
def dpm_solver(
    denoiser: Denoise,
    schedule: Schedule,
    known: Known,
    key: Tensor,
    steps: int,
    clip: float | None = 1.0,
    trace: list[Tensor] | None = None,
    *,
    guide: Guide = unguided,
    residual: Residual | None = None,
    noise: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): rows [N, R, D], deterministic given the first noise.

    The second-order multistep solver of the equation that DDIM at eta = 0 solves to first order; its first and its last
    step are DDIM's. Known numbers do not disturb its memory, for they are the denoiser's own estimate at every level.
    Arguments as in `ddim`.
    """
    x, denoise = first_noise(known, key, noise), bounded(denoiser, known, clip)
    if trace is not None:
        trace.append(x)
    last, last_h = None, None
    for step in walk(schedule, known, steps, eta=0.0, residual=residual):
        clean = guide(denoise, x, step).posterior.mean
        h = _half_log_snr(step.abar_next) - _half_log_snr(step.abar)
        second = last is not None and step.following >= 0
        ahead = clean + (clean - last) * (h / (2 * last_h)) if second else clean  # type: ignore[operator]
        x = known.impose(step.mean(x, ahead))
        last, last_h = clean, h
        if trace is not None:
            trace.append(x)
    return x


def _half_log_snr(abar: float) -> float:
    """lambda = log(sqrt(abar) / sqrt(1 - abar)) of Lu et al. 2022b; infinite at clean data."""
    return 0.5 * math.log(abar / (1 - abar)) if abar < 1 else math.inf
