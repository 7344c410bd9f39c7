"""Minari's HDF5 files, read dataset by dataset at HDF5's own cost.

Minari and h5py spend most of a pass over thousands of short episodes on Python objects; the low-level calls below do
not make them. What they read is what `MinariDataset.iterate_episodes` gives.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from h5py import h5d, h5f, h5g, h5s, h5t

_STEPS = (b"actions", b"rewards", b"terminations", b"truncations")


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
    readers = {name: _Reader() for name in (*observations, *_STEPS, b"observations")}
    file = h5f.open(str(path).encode(), h5f.ACC_RDONLY)
    for number in numbers:
        group = h5g.open(file, f"episode_{number}".encode())
        if observations:
            inner = h5g.open(group, b"observations")
            obs = np.concatenate([_rows(readers[name](inner, name)) for name in observations], axis=1)
        else:
            obs = _rows(readers[b"observations"](group, b"observations"))
        yield RawEpisode(obs, *(readers[name](group, name) for name in _STEPS))


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


class _Reader:
    """Reads one field of episode after episode; its types are looked up once, as all episodes share them."""

    def __init__(self) -> None:
        self._dtype: np.dtype | None = None
        self._memory: h5t.TypeID | None = None

    def __call__(self, group: h5g.GroupID, name: bytes) -> np.ndarray:
        dataset = h5d.open(group, name)
        if self._dtype is None:
            self._dtype = dataset.dtype
            self._memory = h5t.py_create(self._dtype)
        out = np.empty(dataset.shape, dtype=self._dtype)
        if out.size:
            dataset.read(h5s.ALL, h5s.ALL, out, self._memory)
        return out
