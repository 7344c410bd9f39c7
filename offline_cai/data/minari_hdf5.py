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
    """One episode as Minari keeps it, observations flattened."""

    obs: np.ndarray  # [T+1, O]
    action: np.ndarray  # [T, ...]
    reward: np.ndarray  # [T]
    terminations: np.ndarray  # [T] bool
    truncations: np.ndarray  # [T] bool


def episodes(path: Path, fields: Sequence[str], numbers: np.ndarray) -> Iterator[RawEpisode]:
    """The episodes with these numbers. `fields` are the names of a Dict space's leaves, empty for a plain Box.

    Raises:
        KeyError, OSError, RuntimeError: a dataset is missing or cannot be read; its name is in the text.
    """
    observations = [name.encode() for name in fields]
    file = h5f.open(str(path).encode(), h5f.ACC_RDONLY)
    for number in numbers:
        group = h5g.open(file, f"episode_{number}".encode())
        if observations:
            inner = h5g.open(group, b"observations")
            obs = np.concatenate([_rows(_numbers(inner, name)) for name in observations], axis=1)
        else:
            obs = _rows(_numbers(group, b"observations"))
        steps = (_numbers(group, b"actions"), _numbers(group, b"rewards"))
        yield RawEpisode(obs, *steps, _flags(group, b"terminations"), _flags(group, b"truncations"))


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


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
