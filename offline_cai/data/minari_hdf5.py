"""Minari's HDF5 files, read dataset by dataset at HDF5's own cost.

Minari and h5py spend most of a pass over thousands of short episodes on Python objects; the low-level calls below do
not make them. What they read is what `MinariDataset.iterate_episodes` gives.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5s, h5t

from offline_cai.data.hdf5 import room


class RawEpisode(NamedTuple):
    """One episode as Minari keeps it, the leaves of its spaces side by side."""

    obs: np.ndarray  # [T+1, O]
    action: np.ndarray  # [T, A]
    reward: np.ndarray  # [T]
    terminations: np.ndarray  # [T] bool
    truncations: np.ndarray  # [T] bool
    counted: int | None  # steps, as the metadata of the episode say


def count(path: Path) -> int:
    """The number of episodes in a file."""
    file = h5f.open(str(path).encode(), h5f.ACC_RDONLY)
    return sum(name.startswith(b"episode_") for name in h5g.open(file, b"/"))


def episodes(
    path: Path, obs: Mapping[str, int], action: Mapping[str, int], numbers: np.ndarray
) -> Iterator[RawEpisode | Exception]:
    """The episodes with these numbers, or what was raised in place of one that cannot be read.

    `obs` and `action` name HDF5 datasets inside an episode's group, with the width that each has to have.

    Raises:
        OSError: the file cannot be opened.
    """
    file = h5f.open(str(path).encode(), h5f.ACC_RDONLY)
    for number in numbers:
        try:
            yield _episode(h5g.open(file, f"episode_{number}".encode()), obs, action)
        except Exception as error:  # HDF5 raises OSError, KeyError, RuntimeError, TypeError, ValueError and others
            yield error


def _episode(group: h5g.GroupID, obs: Mapping[str, int], action: Mapping[str, int]) -> RawEpisode:
    return RawEpisode(
        _side_by_side(group, obs),
        _side_by_side(group, action),
        _numbers(group, b"rewards"),
        _flags(group, b"terminations"),
        _flags(group, b"truncations"),
        _counted(group),
    )


def _side_by_side(group: h5g.GroupID, widths: Mapping[str, int]) -> np.ndarray:
    columns = []
    for name, width in widths.items():
        array = _numbers(group, name.encode())
        if math.prod(array.shape[1:]) != width:
            raise ValueError(f"{name!r} have shape {array.shape}, but their space has {width} numbers")
        columns.append(array.reshape(-1, width))
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)


def _numbers(group: h5g.GroupID, name: bytes) -> np.ndarray:
    """Any numbers, as float64: their type may differ from one episode to the next, and HDF5 converts."""
    dataset = h5d.open(group, name)
    out = np.empty(room(dataset), dtype=np.float64)
    if out.size:
        dataset.read(h5s.ALL, h5s.ALL, out, h5t.NATIVE_DOUBLE)
    return out


def _flags(group: h5g.GroupID, name: bytes) -> np.ndarray:
    dataset = h5d.open(group, name)
    out = np.empty(room(dataset), dtype=dataset.dtype)
    if out.size:
        dataset.read(h5s.ALL, h5s.ALL, out)
    if out.dtype != bool and not np.isin(out, (0, 1)).all():
        raise ValueError(f"{name.decode()!r} hold other values than 0 and 1")
    return out.astype(bool)


def _counted(group: h5g.GroupID) -> int | None:
    if not h5a.exists(group, b"total_steps"):
        return None
    out = np.empty((), dtype=np.int64)
    h5a.open(group, b"total_steps").read(out)
    return int(out)
