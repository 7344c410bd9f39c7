"""Where the data has been, and evidence for plans that stay there and are short: what a maze planner chooses by.

No map is needed: a grid remembers how far each place is from the nearest that the data has visited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.ndimage import binary_closing, distance_transform_edt, label
from scipy.spatial import cKDTree
from torch import Tensor, nn

from offline_cai import seeding
from offline_cai.core import Chunks
from offline_cai.data.codec import Codec
from offline_cai.diffusion.constraints import Constraint, allowed
from offline_cai.diffusion.sampler import Denoise
from offline_cai.diffusion.schedule import Schedule
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
    far: float = 0.5
    """How far from the data a goal may be, in the units of the observation."""

    def __post_init__(self) -> None:
        if not self.cell > 0 or self.cells < 3 or not self.far >= 0:
            raise UserError(
                f"support: cell ({self.cell}) has to be positive, cells ({self.cells}) at least 3, far ({self.far}) at "
                "least 0."
            )


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
        asked = (points.to(self.origin) - self.origin) / c.cell - 0.5
        at = asked.clamp(0, c.cells - 1.001)
        beyond = (asked - at).norm(dim=-1) * c.cell  # outside the grid
        low = at.long()
        (i, j), (u, v) = low.unbind(-1), (at - low).unbind(-1)
        flat, index = self.distance.flatten(), torch.add(j, i, alpha=c.cells)
        here, right, above, across = (flat[off:].take(index) for off in (0, 1, c.cells, c.cells + 1))
        return torch.lerp(torch.lerp(here, right, v), torch.lerp(above, across, v), u) + beyond

    def along(self, rows: Tensor, parts: int = 4) -> Tensor:
        """The same of the points of rows [N, R, O'] in raw units, `dense` ones: [N, parts (R - 1) + 1]."""
        return self(dense(rows[..., list(self.config.columns)], parts))

    def draw(self, key: Tensor, constraints: Sequence[Constraint] = ()) -> Tensor:
        """A place [N, 2] for each of keys [N], uniform over the visited cells whose centres keep the constraints.

        Raises:
            UserError: none does.
        """
        free = self._free(constraints)
        if not len(free):
            raise UserError("no place that the data has visited keeps all constraints: loosen one.")
        cell = free[seeding.integers(key, len(free))].to(self.origin.dtype)
        return self.origin + (cell + seeding.uniform(key, (2,), stream=1).to(cell)) * self.config.cell

    def _free(self, constraints: Sequence[Constraint] = ()) -> Tensor:
        """Row and column [M, 2] of each visited cell that keeps the constraints on these columns."""
        cells = (self.distance == 0).nonzero()
        return cells[allowed(constraints, self.config.columns, self._centres(cells))] if constraints else cells

    def _centres(self, cell: Tensor) -> Tensor:
        return self.origin + (cell + 0.5).to(self.origin.dtype) * self.config.cell

    def reachable(self, start: Tensor, constraints: Sequence[Constraint] = ()) -> Tensor:
        """The centres [M, 2] of the visited cells that a way through such cells joins to the one nearest a point [2].

        All of them keep the constraints.
        """
        cells = self._free(constraints)
        if not len(cells):
            return self._centres(cells)
        free = torch.zeros_like(self.distance, dtype=torch.bool)
        free[cells[:, 0], cells[:, 1]] = True
        part = torch.from_numpy(label(free.cpu().numpy(), np.ones((3, 3)))[0])[*cells.cpu().T]
        here = int((self._centres(cells) - start.to(self.origin)).norm(dim=1).argmin())
        return self._centres(cells[part.to(cells.device) == part[here]])

    def connected(self, start: Tensor, end: Tensor, constraints: Sequence[Constraint] = ()) -> bool:
        """Whether visited cells that keep the constraints lead from near one point [2] to near the other."""
        cells = self._centres(self._free(constraints))
        if not len(cells):
            return False
        end = cells[(cells - end.to(cells)).norm(dim=1).argmin()]
        return bool((self.reachable(start, constraints) == end).all(1).any())


def dense(rows: Tensor, parts: int = 4) -> Tensor:
    """Rows [N, R, D] with parts - 1 more between each and the next, on the straight line: [N, parts (R - 1) + 1, D]."""
    share = torch.arange(parts, device=rows.device).to(rows)[:, None] / parts
    between = torch.lerp(rows[:, :-1, None], rows[:, 1:, None], share)
    return torch.cat([between.flatten(1, 2), rows[:, -1:]], 1)


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
        return self._outside(self.support.along(x, 2))

    def _outside(self, away: Tensor) -> Tensor:
        return torch.sigmoid(5 * (away - self.margin) / self.support.config.cell).mean(-1)

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return -self.nats * self.share(x)

    def of(self, away: Tensor) -> Tensor:
        """The same nats of rows of which `Support.along`, in two parts, is known: [N, 2 (R - 1) + 1]."""
        return -self.nats * self._outside(away)


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


@dataclass(frozen=True)
class Quick:
    """A plan pays `nats` for each time step that it takes, as its rows say (`Codec.steps`)."""

    codec: Codec
    nats: float
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return -self.nats * self.codec.steps(x).mean(-1)


class Nearest:
    """A plan pays `nats` times the share of its points that are further than usual from the nearest state of the data.

    The measured alternative to `Supported`: it looks at any columns, needs no grid, and keeps the states themselves.
    What is usual is the largest distance but for one in a thousand, between states of every tenth episode and those of
    the others.

    Args:
        columns: of the selected observation.
        states: [M, c], those columns of the data, episode after episode.
        episode: [M], the number of the episode of each.
        every: keep every so many states; the tenth is enough.
    """

    noisy = False
    quadratic = False

    def __init__(
        self, columns: tuple[int, ...], states: np.ndarray, episode: np.ndarray, nats: float, every: int = 10
    ) -> None:
        held = episode % 10 == 0
        self.columns, self.nats = columns, nats
        self.usual = float(np.quantile(cKDTree(states[~held][::every]).query(states[held][::every])[0], 0.999))
        self._tree = cKDTree(states[::every])

    def away(self, x: Tensor) -> Tensor:
        """Distances [N, 2R - 1] of the points of rows [N, R, O'], and of those half-way between, in raw units."""
        points = dense(x[..., list(self.columns)], 2)
        return torch.from_numpy(self._tree.query(points.cpu().numpy())[0]).to(x)

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return -self.nats * (self.away(x) > self.usual).double().mean(-1).to(x)


@dataclass(frozen=True)
class Denoised:
    """A plan pays `nats` for each unit of squared change, on average over its numbers, that denoising it makes.

    Rows [N, R, D] of the model's own space are noised to a level and denoised once. It is the weaker alternative to
    `Supported`: a denoiser that smooths the data's corners likes short cuts.
    """

    denoise: Denoise
    schedule: Schedule
    level: int
    nats: float
    noisy: ClassVar[bool] = False
    quadratic: ClassVar[bool] = False

    def change(self, x: Tensor) -> Tensor:
        """Mean squared change [N] of rows [N, R, D]."""
        k = torch.full((len(x),), self.level, device=x.device)
        noise = seeding.normal(seeding.keys(0, 0, torch.arange(len(x))), tuple(x.shape[1:]), dtype=x.dtype).to(x.device)
        return (self.denoise(self.schedule.add_noise(x, noise, k), k) - x).square().mean((1, 2))

    def __call__(self, x: Tensor, k: Tensor, temperature: float) -> Tensor:
        return -self.nats * self.change(x)
