"""Minari's HDF5 files, read dataset by dataset at HDF5's own cost.

Minari and h5py spend most of a pass over thousands of short episodes on Python objects; the low-level calls below do
not make them. What they read is what `MinariDataset.iterate_episodes` gives.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from h5py import h5d, h5f, h5g, h5s, h5t


class RawEpisode(NamedTuple):
    """One episode as Minari keeps it, the leaves of its spaces side by side."""

    obs: np.ndarray  # [T+1, O]
    action: np.ndarray  # [T, A]
    reward: np.ndarray  # [T]
    terminations: np.ndarray  # [T] bool
    truncations: np.ndarray  # [T] bool


def episodes(path: Path, obs: Sequence[str], action: Sequence[str], numbers: np.ndarray) -> Iterator[RawEpisode]:
    """The episodes with these numbers. `obs` and `action` name HDF5 datasets inside an episode's group.

    Raises:
        KeyError, OSError, RuntimeError: a dataset is missing or cannot be read; its name is in the text.
    """
    obs_names, action_names = [name.encode() for name in obs], [name.encode() for name in action]
    file = h5f.open(str(path).encode(), h5f.ACC_RDONLY)
    for number in numbers:
        group = h5g.open(file, f"episode_{number}".encode())
        yield RawEpisode(
            _side_by_side(group, obs_names),
            _side_by_side(group, action_names),
            _numbers(group, b"rewards"),
            _flags(group, b"terminations"),
            _flags(group, b"truncations"),
        )


def _side_by_side(group: h5g.GroupID, names: Sequence[bytes]) -> np.ndarray:
    columns = [array.reshape(len(array), -1) for array in (_numbers(group, name) for name in names)]
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def _numbers(group: h5g.GroupID, name: bytes) -> np.ndarray:
    """Any numbers, as float64: their type may differ from one episode to the next, and HDF5 converts."""
    dataset = h5d.open(group, name)
    out = np.empty(dataset.shape, dtype=np.float64)
    if out.size:
        dataset.read(h5s.ALL, h5s.ALL, out, h5t.NATIVE_DOUBLE)
    return out


def _flags(group: h5g.GroupID, name: bytes) -> np.ndarray:
    dataset = h5d.open(group, name)
    out = np.empty(dataset.shape, dtype=dataset.dtype)
    if out.size:
        dataset.read(h5s.ALL, h5s.ALL, out)
    return out.astype(bool)
