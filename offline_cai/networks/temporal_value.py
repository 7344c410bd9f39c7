"""The value network of Diffuser (Janner et al. 2022, appendix C): the U-Net's way down, then one number.

Its layers and sizes are those of the paper's code, so that its parameter count comes out.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from offline_cai.errors import UserError
from offline_cai.networks.temporal_unet import ConditionEmbedding, LevelEmbedding, ResidualBlock


class TemporalValue(nn.Module):
    """Rows [N, R, D] and levels [N] to one number each, [N]. R is fixed: the last layers see all rows side by side.

    With `condition` > 0 it also takes conditions [N, condition].
    """

    def __init__(
        self,
        width: int,
        rows: int,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        kernel: int = 5,
        condition: int = 0,
    ) -> None:
        super().__init__()
        if channels * multipliers[-1] % 32:
            raise UserError(
                f"the value network's last level has {channels * multipliers[-1]} channels, but a quarter of them has "
                "to be a multiple of 8: take a larger multiplier or more channels."
            )
        self.rows = rows
        last = channels * multipliers[-1]
        sizes = [width, *(channels * m for m in multipliers)]
        self.embed = LevelEmbedding(channels)
        self.blocks, self.shrink = nn.ModuleList(), nn.ModuleList()
        for inputs, outputs in pairwise(sizes):
            self.blocks.append(ResidualBlock(inputs, outputs, channels, kernel))
            self.blocks.append(ResidualBlock(outputs, outputs, channels, kernel))
            self.shrink.extend([nn.Identity(), nn.Conv1d(outputs, outputs, 3, stride=2, padding=1)])
        for inputs, outputs in pairwise([last, last // 2, last // 4]):
            self.blocks.append(ResidualBlock(inputs, outputs, channels, kernel))
            self.shrink.append(nn.Conv1d(outputs, outputs, 3, stride=2, padding=1))
        for _ in range(len(multipliers) + 2):
            rows = (rows + 1) // 2
        flat = last // 4 * rows
        self.final = nn.Sequential(nn.Linear(flat + channels, flat // 2), nn.Mish(), nn.Linear(flat // 2, 1))
        if condition:
            self.condition = ConditionEmbedding(condition, channels)

    def forward(self, x: Tensor, k: Tensor, condition: Tensor | None = None) -> Tensor:
        require_rows(x, self.rows)
        embedding = self.embed(k)
        if condition is not None:
            embedding = embedding + self.condition(condition)
        h = rearrange(x, "n r d -> n d r")
        for block, shrink in zip(self.blocks, self.shrink, strict=True):
            h = shrink(block(h, embedding))
        return self.final(torch.cat([h.flatten(1), embedding], dim=-1))[:, 0]


def require_rows(x: Tensor, rows: int) -> None:
    """
    Raises:
        UserError: plans of another number of rows than a guide was trained for.
    """
    if x.shape[1] != rows:
        raise UserError(f"a plan of {x.shape[1]} rows was given to a guide that was trained for {rows} rows.")
