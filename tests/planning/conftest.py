"""A model of independent Gaussian rows, whose posterior under a goal is known in closed form."""

from typing import Any

import torch
from torch import Tensor

from offline_cai import seeding
from offline_cai.core import Box, Field, Known, Spec
from offline_cai.data.codec import Codec
from offline_cai.diffusion.evidence import Goal
from offline_cai.diffusion.residual import wiener
from offline_cai.diffusion.schedule import Schedule
from offline_cai.planning.config import EvidenceConfig
from offline_cai.planning.sampling import Model

ROWS, WIDTH, SCALE = 3, 2, 2.0  # rows ~ N(0, I) in the codec's units, whose raw units are twice as large
SCHEDULE = Schedule(32)
SPEC = Spec((Field("observation", WIDTH),), Box((-1.0,), (1.0,)))
FREE = torch.zeros(ROWS, WIDTH, dtype=torch.bool)


def denoise(x: Tensor, k: Tensor) -> Tensor:
    return SCHEDULE.abar_at(k).sqrt() * x


def model(**changes: Any) -> Model:
    codec = Codec(SPEC, ROWS, actions=False, normaliser="gaussian")
    codec.obs_norm.scale.fill_(SCALE)
    residual = wiener(torch.eye(ROWS * WIDTH, dtype=torch.float64), SCHEDULE, FREE)
    return Model(denoise, SCHEDULE, codec, None, residual, None, None)._replace(**changes)


def nothing(n: int) -> tuple[Known, Tensor]:
    value = torch.zeros(n, ROWS, WIDTH, dtype=torch.float64)
    return Known(value, FREE.expand_as(value)), seeding.keys(0, 0, torch.arange(n))


GOAL = EvidenceConfig(goals=(Goal((3.0,), (0,), width=2.0),))
"""Half a nat at distance one of the codec's units from 1.5: the last row's first number becomes N(.75, 1/2)."""
