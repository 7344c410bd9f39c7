"""One name for a dataset, whatever its kind: a Minari id, a D4RL name, or the path of a D4RL file."""

import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

from offline_cai.data import d4rl, d4rl_download, d4rl_file, minari
from offline_cai.data.cache import cache_at
from offline_cai.data.trajectories import Trajectories, digests, verify
from offline_cai.errors import DataWarning, UserError


def is_d4rl(name: str) -> bool:
    """Whether a name means D4RL: a path that ends in .hdf5 or .h5, or one of D4RL's own names."""
    return name.endswith((".hdf5", ".h5")) or name in d4rl_download.table()


def trajectories(name: str, repair: bool = False) -> Trajectories:
    """The store of a dataset: converted on first use, mapped afterwards.

    `repair` leaves damaged episodes out, and `info["dropped"]` says which and why. That makes a store of its own:
    whoever asks without gets the error.

    Raises:
        UserError: it is not there (how to get it), or it is damaged (file, episode, field and mend).
    """
    return (d4rl if is_d4rl(name) else minari).trajectories(name, repair=repair)


def validate(name: str) -> Trajectories:
    """Read every number of a dataset again, with all checks, and compare it with the store it was converted to.

    What is odd, but can be used, is in the store's `info["warnings"]`.

    Raises:
        UserError: the source is damaged, the store is, or they do not agree.
    """
    store = trajectories(name)
    assert store.path is not None
    verify(store.path)
    source = str(d4rl_file.locate(name)[1]) if is_d4rl(name) else name  # downloads live in the cache too
    with tempfile.TemporaryDirectory() as folder, cache_at(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # they were given when it was converted
        again = trajectories(source)
        assert again.path is not None
        if digests(again.path) != digests(store.path):
            raise UserError(f"{name!r} no longer holds what was converted to {store.path}: delete that folder.")
    return store


def note(name: str) -> dict[str, Any]:
    """What this package noted when it collected a dataset; empty for a dataset that others made."""
    return {} if is_d4rl(name) else minari.metadata(minari.load(name))


def environment(name: str) -> tuple[str, Mapping[str, Any]] | None:
    """Gymnasium id and arguments of the environment that a dataset was collected in, if it names one."""
    spec = None if is_d4rl(name) else minari.load(name).spec.env_spec
    return None if spec is None else (spec.id, spec.kwargs)
