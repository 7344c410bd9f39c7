"""Where the data has been, and evidence for plans that stay there and are short: what a maze planner chooses by.

No map is needed: a grid remembers how far each place is from the nearest that the data has visited.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.ndimage import binary_closing, distance_transform_edt
from torch import Tensor, nn

from offline_cai import seeding
from offline_cai.core import Chunks
from offline_cai.errors import UserError


@dataclass(frozen=True)
class SupportConfig:
    """The grid over two columns of the observation."""

    columns: tuple[int, int] = (0, 1)
    """Columns of the selected observation that say where a state is."""
    cell: float = 0.05
    """Side of a cell, in the units of the observation."""
    cells: int = 256
    """Cells along each side."""

    def __post_init__(self) -> None:
        if not self.cell > 0 or self.cells < 3:
            raise UserError(f"support: cell ({self.cell}) has to be positive, and cells ({self.cells}) at least 3.")


class Support(nn.Module):
    """Distances [cells, cells] to the nearest cell that the data has visited, pinholes closed; zero inside."""

    distance: Tensor
    origin: Tensor

    def __init__(self, config: SupportConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("distance", torch.zeros(config.cells, config.cells))
        self.register_buffer("origin", torch.zeros(2))

    def fit(self, chunks: Chunks, columns: list[int]) -> None:
        """Mark where the data was; `columns` are the config's in a whole observation.

        Raises:
            UserError: the data spans more than the grid.
        """
        c, low, high = self.config, [], []
        for chunk in chunks():
            low.append(chunk.obs[:, columns].min(0))
            high.append(chunk.obs[:, columns].max(0))
        corner = torch.from_numpy(np.min(low, axis=0)) - c.cell
        span = float((torch.from_numpy(np.max(high, axis=0)) - corner).max())
        if span > (c.cells - 2) * c.cell:
            raise UserError(
                f"support: the data spans {span:.3g}, more than {c.cells} cells of {c.cell}: raise support.cell to "
                f"{span / (c.cells - 2):.2g} or more."
            )
        self.origin.copy_(corner)
        visited = torch.zeros(c.cells, c.cells, dtype=torch.bool)
        for chunk in chunks():
            at = ((torch.as_tensor(chunk.obs[:, columns]) - corner) / c.cell).long()
            visited[at[:, 0], at[:, 1]] = True
        closed = visited.numpy() | binary_closing(visited.numpy(), np.ones((3, 3)))
        self.distance.copy_(torch.from_numpy(distance_transform_edt(~closed) * c.cell))

    def forward(self, points: Tensor) -> Tensor:
        """How far points [..., 2] are from where the data has been, [...]; bilinear between the cells' centres."""
        c = self.config
        at = ((points - self.origin) / c.cell - 0.5).clamp(0, c.cells - 1.001)
        low = at.floor()
        part, (i, j) = at - low, low.long().unbind(-1)
        u, v = part.unbind(-1)
        flat, index = self.distance.flatten(), i * c.cells + j
        below = torch.lerp(flat[index], flat[index + 1], v)
        return torch.lerp(below, torch.lerp(flat[index + c.cells], flat[index + c.cells + 1], v), u)

    def draw(self, key: Tensor) -> Tensor:
        """A place [N, 2] for each of keys [N], uniform over the cells that the data has visited."""
        free = (self.distance == 0).nonzero()
        cell = free[seeding.integers(key, len(free))].to(self.origin.dtype)
        return self.origin + (cell + seeding.uniform(key, (2,), stream=1).to(cell)) * self.config.cell


def _points(x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Rows [N, R, O'] to their positions and those half-way between, [N, 2R - 1, 2]."""
    at = x[..., list(columns)]
    return torch.cat([at, (at[:, 1:] + at[:, :-1]) / 2], 1)


@dataclass(frozen=True)
class Supported:
    """A plan pays `nats` times the share of its points that are more than `margin` from where the data has been."""

    support: Support
    nats: float
    margin: float
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    def share(self, x: Tensor) -> Tensor:
        """The share of points outside, [N], of rows [N, R, O'] in raw units; the border is soft, by .2 of a cell."""
        away = self.support(_points(x, self.support.config.columns)) - self.margin
        return torch.sigmoid(5 * away / self.support.config.cell).mean(-1)

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return -self.nats * self.share(x)


@dataclass(frozen=True)
class Short:
    """A plan pays `nats` for each unit of its path's length."""

    columns: tuple[int, ...]
    nats: float
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    def length(self, x: Tensor) -> Tensor:
        """[N], of rows [N, R, O'] in raw units."""
        at = x[..., list(self.columns)]
        return ((at[:, 1:] - at[:, :-1]).square().sum(-1) + 1e-12).sqrt().sum(-1)

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return -self.nats * self.length(x)
