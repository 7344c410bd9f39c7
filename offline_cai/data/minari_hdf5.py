"""Minari's HDF5 files, read dataset by dataset at HDF5's own cost.

Minari and h5py spend most of a pass over thousands of short episodes on Python objects and on finding out, for every
dataset anew, what type it has; the low-level calls below do neither. What they read is what
`MinariDataset.iterate_episodes` gives.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5s, h5t

from offline_cai.data.hdf5 import room

BOOLEAN = h5t.py_create(np.dtype(bool))  # HDF5 knows none: h5py's enumeration of FALSE and TRUE
NUMBERS = (h5t.INTEGER, h5t.FLOAT, h5t.ENUM)  # what HDF5 converts; of a complex number it would drop a part


class RawEpisode(NamedTuple):
    """One episode as Minari keeps it, the leaves of its spaces side by side."""

    obs: np.ndarray  # [T+1, O]
    action: np.ndarray  # [T, A]
    reward: np.ndarray  # [T]
    terminations: np.ndarray  # [T] bool
    truncations: np.ndarray  # [T] bool
    counted: int | None  # steps, as the metadata of the episode say
    log_prob: np.ndarray | None  # [T]


def count(path: Path) -> int:
    """The number of episodes in a file, in which Minari keeps nothing else; costs the same for any number."""
    file = h5f.open(str(path).encode(), h5f.ACC_RDONLY)
    return int(h5g.open(file, b"/").get_num_objs())


def episodes(
    path: Path, obs: Mapping[str, int], action: Mapping[str, int], numbers: np.ndarray, log_prob: str | None = None
) -> Iterator[RawEpisode | Exception]:
    """The episodes with these numbers, or what was raised in place of one that cannot be read.

    `obs` and `action` name HDF5 datasets inside an episode's group, with the width that each has to have; `log_prob`
    names the one with log-probabilities, if there is one.

    Raises:
        OSError: the file cannot be opened.
    """
    obs_parts, action_parts = ({_Numbers(name): width for name, width in parts.items()} for parts in (obs, action))
    reward, logged = _Numbers("rewards"), None if log_prob is None else _Numbers(log_prob)
    file = h5f.open(str(path).encode(), h5f.ACC_RDONLY)
    for number in numbers:
        try:
            group = h5g.open(file, f"episode_{number}".encode())
            yield RawEpisode(
                _side_by_side(group, obs_parts),
                _side_by_side(group, action_parts),
                reward.read(group),
                _flags(group, b"terminations"),
                _flags(group, b"truncations"),
                _counted(group),
                None if logged is None else logged.read(group),
            )
        except Exception as error:  # HDF5 raises OSError, KeyError, RuntimeError, TypeError, ValueError and others
            yield error


class _Numbers:
    """A dataset that every episode has, read as float32 if it is that in the first, else as float64.

    Its type may differ from one episode to the next: HDF5 converts, or refuses, and the store keeps float32 anyway.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._types: tuple[type, h5t.TypeID] | None = None  # NumPy's and HDF5's

    def read(self, group: h5g.GroupID) -> np.ndarray:
        dataset = h5d.open(group, self.name.encode())
        if self._types is None:
            if dataset.get_type().get_class() not in NUMBERS:
                raise TypeError(f"{self.name!r} hold {dataset.dtype}, not numbers")
            single = dataset.dtype == np.float32
            self._types = (np.float32, h5t.NATIVE_FLOAT) if single else (np.float64, h5t.NATIVE_DOUBLE)
        numpy_type, hdf5_type = self._types
        out: np.ndarray = np.empty(room(dataset), numpy_type)
        if out.size:
            dataset.read(h5s.ALL, h5s.ALL, out, hdf5_type)
        return out


def _side_by_side(group: h5g.GroupID, parts: Mapping[_Numbers, int]) -> np.ndarray:
    columns = []
    for part, width in parts.items():
        array = part.read(group)
        if math.prod(array.shape[1:]) != width:
            raise ValueError(f"{part.name!r} have shape {array.shape}, but their space has {width} numbers")
        columns.append(array.reshape(len(array), width))
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def _flags(group: h5g.GroupID, name: bytes) -> np.ndarray:
    dataset = h5d.open(group, name)
    out = np.empty(room(dataset), dtype=np.uint8)
    if out.size:
        try:
            dataset.read(h5s.ALL, h5s.ALL, out, BOOLEAN)
        except OSError:  # HDF5 makes no enumeration of other flags; what cannot be read at all raises again
            numbers = _Numbers(name.decode()).read(group)
            out = np.where((numbers == 0) | (numbers == 1), numbers, 2).astype(np.uint8)
    if out.max(initial=0) > 1:
        raise ValueError(f"{name.decode()!r} hold other values than 0 and 1")
    return out.view(bool)


def _counted(group: h5g.GroupID) -> int | None:
    try:
        attribute = h5a.open(group, b"total_steps")
    except KeyError:
        return None
    if attribute.get_storage_size() > 8:
        raise ValueError("the attribute 'total_steps' is not one whole number")
    out = np.zeros(8, dtype=np.int64)  # room for the 8 numbers that 8 bytes may be: HDF5 writes what is there
    attribute.read(out, h5t.NATIVE_INT64)
    return int(out[0])
