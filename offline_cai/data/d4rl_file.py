"""What is inside a D4RL file: finding, reading and checking its arrays, and the rows where a time limit cut them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from offline_cai.core import Spec
from offline_cai.data.d4rl_download import download, entry, file_of, name_of, table
from offline_cai.data.hdf5 import room
from offline_cai.errors import UserError

Arrays = dict[str, np.ndarray]
REQUIRED = ("observations", "actions", "rewards", "terminals")
FIELDS = (*REQUIRED, "timeouts", "next_observations")
LOG_PROB = "infos/action_log_probs"


def locate(source: str | Path) -> tuple[str | None, Path]:
    """The D4RL name, if known, and the file of a source."""
    if isinstance(source, str) and source in table():
        return source, file_of(source) if file_of(source).exists() else download(source)
    path, is_file = Path(source), os.path.isfile(source)
    if not is_file and isinstance(source, str) and not path.suffix and len(path.parts) == 1:
        entry(source)  # raises with the nearest names
    if not is_file:
        raise UserError(f"there is no D4RL file {path}. Give the path of an HDF5 file or the name of a D4RL dataset.")
    return name_of(path), path


def verified(name: str | None, file: Path) -> Path:
    """The file; if it is the cached one of a D4RL dataset, after its hash has been checked."""
    return download(name) if name and file == file_of(name) else file


def read(file: Path, wanted: tuple[str, ...] | None = None) -> Arrays:
    """The wanted datasets of a file, or all but `metadata/*`, by their paths inside it, in the file's order."""
    names: list[str] = []
    try:
        with h5py.File(file, "r") as root:
            root.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            names = [name for name in names if (name in wanted if wanted else "metadata" not in name)]
            for name in names:
                room(root[name].id)
            return {name: np.asarray(root[name][()]) for name in names}
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, ValueError and others
        raise UserError(
            f"{file} cannot be read as HDF5 ({type(error).__name__}: {' '.join(str(error).split())}). It is damaged or "
            "something else: remove it and download or write it again."
        ) from error


def check(data: Mapping[str, np.ndarray], where: str) -> None:
    """Raise a UserError that names field, row and mend unless the arrays are what D4RL's readers take for granted."""
    check_fields(data, where)
    if not_finite(data).any():
        raise UserError(first_not_finite(data, where))


def not_finite(data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Rows [N] bool in which a checked field holds NaN or an infinite number."""
    bad = np.zeros(len(data["rewards"]), dtype=bool)
    for name in FIELDS:
        if name in data and data[name].dtype.kind == "f":
            bad |= ~np.isfinite(data[name].reshape(len(bad), -1)).all(axis=1)
    return bad


def first_not_finite(data: Mapping[str, np.ndarray], where: str, rows: slice = slice(None)) -> str:
    """The sentence about the first number in these rows that is not finite; there has to be one."""
    for name in FIELDS:
        bad = np.argwhere(~np.isfinite(data[name][rows])) if name in data else np.empty(0)
        if len(bad):
            value, row = data[name][rows][tuple(bad[0])], range(len(data["rewards"]))[rows][bad[0][0]]
            return (
                f"{where}: {name!r} hold {value} at row {row} ({len(bad)} such numbers in all). Download the file "
                "again, or drop the episode of this row."
            )
    raise AssertionError("all numbers are finite")


def check_fields(data: Mapping[str, np.ndarray], where: str) -> None:
    """Raise a UserError unless the fields are there, fit each other and hold numbers, and flags are 0 or 1."""
    for name in REQUIRED:
        if name not in data:
            held = ", ".join(sorted(data)) or "nothing"
            raise UserError(f"{where} has no {name!r} (it holds {held}): it is no D4RL dataset, or a damaged one.")
    rows = np.shape(data["rewards"])[0] if np.ndim(data["rewards"]) else 0
    if not rows:
        raise UserError(f"{where}: 'rewards' hold no rows: there is nothing to read.")
    for name in FIELDS:
        array = data.get(name)
        if array is None:
            continue
        flat = name in ("rewards", "terminals", "timeouts")
        if np.ndim(array) == 0 or len(array) != rows or (flat and array.size != rows):
            raise UserError(
                f"{where}: {name!r} have shape {np.shape(array)} beside {rows} rows of 'rewards'. Each field needs one "
                "entry per row: download the file again, or cut all to the same rows."
            )
        if array.dtype.kind not in "biuf":
            raise UserError(f"{where}: {name!r} hold {array.dtype}, not numbers. Convert or download it again.")
        if name in ("terminals", "timeouts") and (wrong := np.flatnonzero((array != 0) & (array != 1))).size:
            raise UserError(
                f"{where}: {name!r} hold {array.flat[wrong[0]]} at row {wrong[0]}, but a flag is 0 or 1. Mend that row."
            )
    if np.shape(data.get("next_observations", data["observations"])) != np.shape(data["observations"]):
        raise UserError(
            f"{where}: 'next_observations' have shape {data['next_observations'].shape}, 'observations' "
            f"{data['observations'].shape}. Remove the former (a copy of the file will do) or mend it."
        )


def parse_spec(text: Any, where: str) -> Spec:
    """The Spec that a file declares as JSON.

    Raises:
        UserError: it is something else; `where` says which file and which part of it.
    """
    try:
        spec = Spec.from_json(json.loads(text))
    except Exception as error:  # JSON that holds something else raises KeyError, TypeError, RecursionError and others
        raise UserError(f"{where} is no spec ({type(error).__name__}: {error}). Mend or remove it.") from error
    names = [field.name for field in spec.obs]
    if len(set(names)) < len(names) or any(field.width < 0 for field in spec.obs):
        raise UserError(f"{where} has fields {list(map(tuple, spec.obs))}: each has a name of its own and a width.")
    return spec


def cut_rows(
    data: Mapping[str, np.ndarray],
    terminal: np.ndarray,
    name: str | None,
    limit: int | None,
    where: str,
    after_terminal: int,
    after_cut: int,
) -> np.ndarray:
    """Rows [N] bool at a time limit: the file's `timeouts`, else those where a step counter reaches limit - 1.

    The counter starts at 0 and goes on from `after_terminal` and `after_cut`: D4RL's own readers begin some episodes
    at 1, and what they give is reproduced.
    """
    if "timeouts" in data:
        return data["timeouts"].reshape(-1) == 1
    limit = entry(name).max_episode_steps if limit is None and name else limit
    if limit is not None and limit < 1:
        raise UserError(f"max_episode_steps is {limit}, but an episode has at least one step.")
    if limit is None:
        raise UserError(
            f"{where} has no 'timeouts', and its name is none of D4RL's, so nobody knows where episodes were cut. "
            "Add 'timeouts', name the file as D4RL does, or give max_episode_steps, the time limit, in Python."
        )
    cut, terminals = np.zeros_like(terminal), np.flatnonzero(terminal)
    start, step, rows = 0, 0, len(terminal)
    while True:
        found = np.searchsorted(terminals, start)
        true_end = int(terminals[found]) if found < len(terminals) else rows
        at_limit = start + limit - 1 - step if step < limit else rows
        stop = min(true_end, at_limit)
        if stop >= rows:
            return cut
        cut[stop] = at_limit == stop
        step = after_cut if at_limit == stop else after_terminal
        start = stop + 1
