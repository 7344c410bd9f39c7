"""Noise schedules: diffusers' betas, and the few coefficients that training and sampling read off them."""

from typing import Literal

import torch
from torch import Tensor, nn

ScheduleKind = Literal["cosine", "linear"]
_DIFFUSERS = {"cosine": "squaredcos_cap_v2", "linear": "linear"}


class Schedule(nn.Module):
    """x_k = sqrt(abar_k) x_0 + sqrt(1 - abar_k) eps for levels k = 0 (least noise) to T - 1.

    `cosine` is Nichol and Dhariwal (2021), `linear` Ho et al. (2020), both by diffusers' DDPMScheduler. Ho's betas,
    1e-4 to .02, are for 1000 levels: they are scaled by 1000 / T, so that the last level is noise for any T.
    """

    ends: Tensor  # [T + 1], abar with that of clean data after it, which is level -1 so

    def __init__(self, levels: int, kind: ScheduleKind = "cosine") -> None:
        super().__init__()
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        self.levels = levels
        betas = {"beta_start": min(0.1 / levels, 0.5), "beta_end": min(20.0 / levels, 0.999)}
        scheduler = DDPMScheduler(num_train_timesteps=levels, beta_schedule=_DIFFUSERS[kind], **betas)
        self.register_buffer("ends", torch.cat([scheduler.alphas_cumprod, torch.ones(1)]), persistent=False)

    @property
    def abar(self) -> Tensor:
        """[T]."""
        return self.ends[:-1]

    def abar_at(self, k: Tensor) -> Tensor:
        """abar [N, 1, 1] at levels k [N]; level -1 is clean data, abar 1."""
        return self.ends[k][:, None, None]

    def add_noise(self, x: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """x_k from x_0 [N, R, D], standard normal noise [N, R, D] and levels [N]."""
        abar = self.abar_at(k)
        return abar.sqrt() * x + (1 - abar).sqrt() * noise

    def clean_from_noise(self, x: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """The x_0 that x_k [N, R, D] came from if its noise was `noise`."""
        abar = self.abar_at(k)
        return (x - (1 - abar).sqrt() * noise) / abar.sqrt()

    def velocity(self, x: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022, appendix D), of unit variance where x_0 is."""
        abar = self.abar_at(k)
        return abar.sqrt() * noise - (1 - abar).sqrt() * x

    def clean_from_velocity(self, x: Tensor, velocity: Tensor, k: Tensor) -> Tensor:
        """The x_0 that x_k [N, R, D] came from if its velocity was `velocity`."""
        abar = self.abar_at(k)
        return abar.sqrt() * x - (1 - abar).sqrt() * velocity
