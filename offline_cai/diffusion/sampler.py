"""Samplers of the reverse process. Each is one function, named after its paper's algorithm.

They take a denoiser D(x_k, k) -> x_0 and impose the known rows at every level, as the denoiser was trained.
"""

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Denoiser, Known
from offline_cai.diffusion.schedule import Schedule
from offline_cai.errors import UserError


def levels_of(schedule: Schedule, steps: int) -> list[int]:
    """`steps` levels from T - 1 down, evenly spaced so that the last step ends at clean data ("trailing" spacing).

    Raises:
        UserError: more steps than levels, or none.
    """
    if not 1 <= steps <= schedule.levels:
        raise UserError(
            f"{steps} sampling steps were asked for; the schedule has {schedule.levels} levels: take 1 to that."
        )
    return [round(schedule.levels * (1 - i / steps)) - 1 for i in range(steps)]


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    schedule: Schedule,
    known: Known,
    key: Tensor,
    steps: int,
    eta: float = 0.0,
    clip: float | None = 1.0,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, equations 12 and 16): rows [N, R, D] in the model's space.

    Args:
        known: conditions [N, R, D].
        key: int64 [N]; all noise of a plan is a function of its key.
        steps: denoising steps, each one call of the denoiser.
        eta: 0 is deterministic given the first noise; 1 has the variance of DDPM's posterior.
        clip: bound on the estimate of x_0, None for no bound.
        trace: if given, the first noise and x after each step are appended to it.
    """
    shape = tuple(known.value.shape[1:])
    x = known.impose(seeding.normal(key, shape, dtype=known.value.dtype))
    if trace is not None:
        trace.append(x)
    levels = levels_of(schedule, steps)
    for step, (level, following) in enumerate(zip(levels, [*levels[1:], -1], strict=True)):
        k, k_next = torch.full_like(key, level), torch.full_like(key, following)
        abar, abar_next = schedule.abar_at(k), schedule.abar_at(k_next)
        clean = denoiser(x, k)
        if clip is not None:
            clean = clean.clamp(-clip, clip)
        noise = (x - abar.sqrt() * clean) / (1 - abar).sqrt()
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
        x = abar_next.sqrt() * clean + (1 - abar_next - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0 and following >= 0:
            x = x + sigma * seeding.normal(key, shape, stream=step + 1, dtype=x.dtype)
        x = known.impose(x)
        if trace is not None:
            trace.append(x)
    return x


def ddpm(
    denoiser: Denoiser,
    schedule: Schedule,
    known: Known,
    key: Tensor,
    clip: float | None = 1.0,
    trace: list[Tensor] | None = None,
) -> Tensor:
    """DDPM (Ho et al. 2020, algorithm 2, posterior variance): rows [N, R, D]; one step per level.

    It is DDIM at eta = 1 on all levels (Song et al. 2021, section 4.1). Arguments as in `ddim`.
    """
    return ddim(denoiser, schedule, known, key, schedule.levels, eta=1.0, clip=clip, trace=trace)
