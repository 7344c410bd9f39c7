"""A reference planner without learning: shortest paths over the cells that the data has visited."""

import numpy as np
import torch
from scipy.ndimage import binary_closing
from scipy.sparse import coo_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from offline_cai.core import Plan
from offline_cai.errors import UserError

_MOVES = ((0, 1), (1, 0), (1, 1), (1, -1))


class OccupancyPaths:
    """Proposes the shortest path over the data's occupancy grid, walked at the data's mean speed.

    A cell is free if some state of the data lies in it; the grid is closed once to fill pinholes. Paths go through
    neighbours, diagonals included. It knows where the data went and nothing else, as a model trained on the data does.
    """

    def __init__(
        self, states: np.ndarray, position: np.ndarray, goal: np.ndarray, stride: int, dt: float, cell: float = 0.05
    ) -> None:
        """`states` [M, 4] are (x, y, vx, vy) from the data; `position` and `goal` columns of an observation."""
        self._position, self._goal, self._stride, self._cell = position, goal, stride, cell
        self._origin = states[:, :2].min(0) - cell
        cells = self._cells(states[:, :2])
        grid = np.zeros(cells.max(0) + 2, dtype=bool)
        grid[tuple(cells.T)] = True
        grid |= binary_closing(grid, np.ones((3, 3)))
        self._free = np.argwhere(grid)
        self._number = np.full(grid.shape, -1)
        self._number[grid] = np.arange(len(self._free))
        self._graph = self._edges(grid)
        self._spacing = float(np.linalg.norm(states[:, 2:4], axis=1).mean()) * stride * dt
        self._speed = self._spacing / (stride * dt)

    def _cells(self, xy: np.ndarray) -> np.ndarray:
        return ((xy - self._origin) / self._cell).astype(int)

    def _edges(self, grid: np.ndarray) -> coo_array:
        rows, columns, lengths = [], [], []
        for di, dj in _MOVES:
            to = self._free + np.array([di, dj])
            inside = ((to >= 0) & (to < grid.shape)).all(1)
            number = np.full(len(to), -1)
            number[inside] = self._number[tuple(to[inside].T)]
            rows.append(np.flatnonzero(number >= 0))
            columns.append(number[number >= 0])
            lengths.append(np.full((number >= 0).sum(), np.hypot(di, dj) * self._cell))
        edges = (np.concatenate(lengths), (np.concatenate(rows), np.concatenate(columns)))
        return coo_array(edges, shape=(len(self._free),) * 2).tocsr()

    def _nearest(self, xy: np.ndarray) -> int:
        centres = self._origin + (self._free + 0.5) * self._cell
        return int(np.linalg.norm(centres - xy, axis=1).argmin())

    def __call__(self, obs: np.ndarray, key: Tensor, under_way: Plan | None = None) -> Plan:
        paths = [self._walk(row[self._position], row[self._goal]) for row in obs]
        length = max(len(path) for path in paths)
        rows = [np.concatenate([path, np.repeat(path[-1:], length - len(path), axis=0)]) for path in paths]
        return Plan.one_each(torch.from_numpy(np.stack(rows)), None, self._stride)

    def _walk(self, start: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Rows (x, y, vx, vy) from start to goal at constant speed, at rest in the end."""
        source, target = self._nearest(start), self._nearest(goal)
        _, before = dijkstra(self._graph, directed=False, indices=target, return_predecessors=True)
        if source != target and before[source] < 0:
            raise UserError(f"the data has visited no way from {start} to {goal}.")
        chain = [source]
        while chain[-1] != target:
            chain.append(int(before[chain[-1]]))
        centres = self._origin + (self._free[chain] + 0.5) * self._cell
        path = np.concatenate([start[None], centres[1:-1], goal[None]])
        along = np.concatenate([[0], np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()])
        at = np.append(np.arange(0, along[-1], self._spacing), along[-1])
        xy = np.stack([np.interp(at, along, path[:, d]) for d in range(2)], axis=1)
        step = np.diff(xy, axis=0, append=xy[-1:])
        distance = np.linalg.norm(step, axis=1, keepdims=True)
        return np.concatenate([xy, step / np.maximum(distance, 1e-9) * self._speed], axis=1)
