"""Residual perceptrons over whole trajectories: what temporal convolutions are for, at a fraction of their cost."""

import torch
from torch import Tensor, nn

from offline_cai.networks.temporal_unet import ConditionEmbedding, SinusoidalEmbedding
from offline_cai.networks.temporal_value import require_rows


class FilmBlock(nn.Module):
    """h + a hidden layer of h whose units are scaled and shifted by the level: [N, width] -> [N, width]."""

    def __init__(self, width: int, embedding: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.level = nn.Linear(embedding, 2 * width)
        for layer in (self.second, self.level):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.level(embedding).chunk(2, -1)
        return h + self.second(nn.functional.silu(torch.addcmul(shift, self.first(h), 1 + scale)))


class TemporalMLP(nn.Module):
    """Rows [N, R, D] and levels [N] to rows [N, R, D], for one number of rows; the interface of `TemporalUNet`."""

    divisor = 1

    def __init__(
        self, width: int, rows: int, hidden: int = 512, blocks: int = 4, embedding: int = 64, condition: int = 0
    ) -> None:
        super().__init__()
        hidden_layer = nn.Linear(embedding, embedding), nn.SiLU()
        self.embed = nn.Sequential(
            SinusoidalEmbedding(embedding), *hidden_layer, nn.Linear(embedding, embedding), nn.SiLU()
        )
        self.first, self.last = nn.Linear(rows * width, hidden), nn.Linear(hidden, rows * width)
        self.blocks = nn.ModuleList(FilmBlock(hidden, embedding) for _ in range(blocks))
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        if condition:
            self.condition = ConditionEmbedding(condition, embedding)

    def forward(self, x: Tensor, k: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.last(self._hidden(x, k, condition)).view_as(x)

    def _hidden(self, x: Tensor, k: Tensor, condition: Tensor | None) -> Tensor:
        """What the last layer reads, [N, hidden]."""
        embedding = self.embed(k[:1] if k.stride() == (0,) else k)  # samplers expand one level over all rows
        if condition is not None:
            embedding = embedding + self.condition(condition)
        h = self.first(x.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return nn.functional.silu(h)


class ValueMLP(TemporalMLP):
    """Rows [N, R, D] and levels [N] to one number each, [N]; the interface of `TemporalValue`."""

    def __init__(self, width: int, rows: int, hidden: int = 512, blocks: int = 4, condition: int = 0) -> None:
        super().__init__(width, rows, hidden, blocks, condition=condition)
        self.rows, self.last = rows, nn.Linear(hidden, 1)

    def forward(self, x: Tensor, k: Tensor, condition: Tensor | None = None) -> Tensor:
        require_rows(x, self.rows)
        return self.last(self._hidden(x, k, condition))[:, 0]
