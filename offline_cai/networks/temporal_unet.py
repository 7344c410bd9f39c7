"""The temporal U-Net of Diffuser (Janner et al. 2022, appendix C): convolutions over time, channels are the row.

Its layers and sizes are those of the paper's code, so that its parameter counts come out.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from offline_cai.errors import UserError
from offline_cai.networks.mlp import mlp


class SinusoidalEmbedding(nn.Module):
    """Noise levels [N] to [N, width] (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, k: Tensor) -> Tensor:
        half = self.width // 2
        frequency = torch.exp(torch.arange(half, device=k.device) * (-math.log(10000) / (half - 1)))
        angle = k[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


def conv_block(inputs: int, outputs: int, kernel: int, groups: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2), nn.GroupNorm(groups, outputs), nn.Mish()
    )


class ResidualBlock(nn.Module):
    """Two convolutions over time with the level's embedding added between them: [N, in, R] -> [N, out, R]."""

    def __init__(self, inputs: int, outputs: int, embedding: int, kernel: int) -> None:
        super().__init__()
        self.first = conv_block(inputs, outputs, kernel)
        self.second = conv_block(outputs, outputs, kernel)
        self.level = nn.Sequential(nn.Mish(), nn.Linear(embedding, outputs))
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.first(x) + rearrange(self.level(embedding), "n c -> n c 1")
        return self.second(h) + self.skip(x)


def _through(blocks: Any, h: Tensor, embedding: Tensor) -> Tensor:
    for block in blocks:
        h = block(h, embedding)
    return h


class LevelEmbedding(nn.Sequential):
    """Levels [N] to [N, channels]."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            SinusoidalEmbedding(channels),
            nn.Linear(channels, channels * 4),
            nn.Mish(),
            nn.Linear(channels * 4, channels),
        )


class ConditionEmbedding(nn.Module):
    """Conditions [N, C] to [N, channels], to be added to the level's; zero for a row that holds a NaN."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.layers = mlp(width, (channels * 4,), channels, nn.Mish)

    def forward(self, condition: Tensor) -> Tensor:
        given = condition.isfinite().all(-1, keepdim=True)
        return torch.where(given, self.layers(condition.nan_to_num()), 0.0)


class TemporalUNet(nn.Module):
    """Rows [N, R, D] and levels [N] to rows [N, R, D]. R has to be divisible by 2^(levels - 1).

    With `condition` > 0 it also takes conditions [N, condition], as `core.Denoiser` says.
    """

    def __init__(
        self,
        width: int,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4),
        kernel: int = 5,
        condition: int = 0,
    ) -> None:
        super().__init__()
        if channels % 8:
            raise UserError(f"channels is {channels}, but the group norm needs a multiple of 8.")
        sizes = [width, *(channels * m for m in multipliers)]
        pairs = list(pairwise(sizes))
        self.divisor = 2 ** (len(pairs) - 1)
        self.embed = LevelEmbedding(channels)

        def blocks(inputs: int, outputs: int) -> nn.ModuleList:
            first = ResidualBlock(inputs, outputs, channels, kernel)
            return nn.ModuleList([first, ResidualBlock(outputs, outputs, channels, kernel)])

        self.down = nn.ModuleList(blocks(i, o) for i, o in pairs)
        self.shrink = nn.ModuleList(nn.Conv1d(o, o, 3, stride=2, padding=1) for _, o in pairs[:-1])
        self.middle = blocks(sizes[-1], sizes[-1])
        self.up = nn.ModuleList(blocks(2 * o, i) for i, o in reversed(pairs[1:]))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(i, i, 4, stride=2, padding=1) for i, _ in reversed(pairs[1:]))
        self.final = nn.Sequential(conv_block(sizes[1], sizes[1], kernel), nn.Conv1d(sizes[1], width, 1))
        if condition:
            self.condition = ConditionEmbedding(condition, channels)

    def forward(self, x: Tensor, k: Tensor, condition: Tensor | None = None) -> Tensor:
        if x.shape[1] % self.divisor:
            raise UserError(
                f"a plan of {x.shape[1]} rows cannot pass {len(self.down)} levels of the U-Net: take a multiple of "
                f"{self.divisor} rows or fewer multipliers."
            )
        embedding = self.embed(k)
        if condition is not None:
            embedding = embedding + self.condition(condition)
        h = rearrange(x, "n r d -> n d r")
        skips = []
        for level, blocks in enumerate(self.down):
            h = _through(blocks, h, embedding)
            skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        h = _through(self.middle, h, embedding)
        for blocks, grow in zip(self.up, self.grow, strict=True):
            h = torch.cat([h, skips.pop()], dim=1)
            h = grow(_through(blocks, h, embedding))
        return rearrange(self.final(h), "n d r -> n r d")
