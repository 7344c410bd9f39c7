"""D4RL's HDF5 files in and out, and its two readers with the dictionaries that they give.

A file holds rows (observation, action, reward, terminal) of episodes written one after another, in some versions with
`timeouts` and `next_observations`. Without the latter nobody knows what followed a row at a time limit, so that
transition is lost, as in D4RL's own reader.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from offline_cai.core import Box, Episode, Field, Spec
from offline_cai.data.cache import converted
from offline_cai.data.checks import both_flags
from offline_cai.data.d4rl_download import download
from offline_cai.data.d4rl_file import (
    FIELDS,
    LOG_PROB,
    REQUIRED,
    Arrays,
    check,
    check_fields,
    cut_rows,
    first_not_finite,
    locate,
    not_finite,
    parse_spec,
    read,
    verified,
)
from offline_cai.data.intake import Reading
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import Notice, UserError
from offline_cai.interrupts import Interrupt

__all__ = ["download", "qlearning_dataset", "sequence_dataset", "trajectories", "write"]

_SLICE = 1 << 16


def trajectories(source: str | Path, *, max_episode_steps: int | None = None, repair: bool = False) -> Trajectories:
    """The store of a D4RL file or of a D4RL dataset such as "hopper-medium-v2": converted once, mapped afterwards.

    An episode ends at a terminal, at a time-out, where `next_observations` do not go on as the next row (in D4RL's
    replay datasets not every cut is flagged), and at the end of the file. A true end without a next observation repeats
    its last one. Actions are in [-1, 1] unless the file comes from `write`; log-probabilities of the acting policy are
    kept where the file has one finite number per row; other `infos/*` and `metadata/*` are not read.

    Args:
        source: a path, or a name, whose file is downloaded if it is not in the cache.
        max_episode_steps: where a file without `timeouts` cuts episodes; by default D4RL's limit for the dataset that
            the file's name says.
        repair: leave damaged episodes out: those with NaN, infinite numbers or actions out of bounds. What is wrong
            with the whole file (a missing field, lengths that disagree, a flag that is not 0 or 1) stays an error.

    Raises:
        UserError: no such dataset or file; no network; a damaged file (file, field, row or episode, and mend).
    """
    name, file = locate(source)
    key = f"d4rl/{name or file.stem}" + (f"-cut-at-{max_episode_steps}" if max_episode_steps is not None else "")

    def convert() -> tuple[Spec, Iterator[Reading]]:
        data = read(verified(name, file), (*FIELDS, LOG_PROB))
        check_fields(data, str(file))
        return _spec(file, data), readings(data, name, max_episode_steps, str(file))

    return converted(key, file, convert, repair)


# Episodes -------------------------------------------------------------------------------------------------------------


def _spec(file: Path, data: Arrays) -> Spec:
    for name in ("observations", "actions"):
        if data[name].ndim != 2 or 0 in data[name].shape:
            raise UserError(
                f"{file}: {name!r} have shape {data[name].shape}, not [rows, width]. This version trains on flat "
                "observations and continuous actions: flatten them first."
            )
    try:
        with h5py.File(file, "r") as root:
            declared = root.attrs.get("offline_cai")
    except Exception as error:  # h5py raises OSError, RuntimeError, TypeError and others
        raise UserError(f"{file}: its attributes cannot be read ({error}). Write it again.") from error
    if declared is not None:
        return parse_spec(declared, f"{file}, attribute 'offline_cai'")
    obs, action = data["observations"].shape[1], data["actions"].shape[1]
    return Spec((Field("observation", obs),), Box((-1.0,) * action, (1.0,) * action))


def readings(data: Arrays, name: str | None, limit: int | None, where: str) -> Iterator[Reading]:
    """The episodes in rows by D4RL's names, cut as `trajectories` says, and what is wrong or odd about them."""
    obs, action, following = data["observations"], data["actions"], data.get("next_observations")
    reward, terminal, rows = data["rewards"].reshape(-1), data["terminals"].reshape(-1) == 1, len(data["rewards"])
    cut, bad, log_prob = cut_rows(data, terminal, name, limit, where, 0, 0), not_finite(data), data.get(LOG_PROB)
    if log_prob is not None:
        fits = log_prob.shape in ((rows,), (rows, 1)) and log_prob.dtype.kind == "f" and np.isfinite(log_prob).all()
        log_prob = log_prob.reshape(-1) if fits else None
        if not fits:
            yield Notice(f"{LOG_PROB!r} are not used: they are not one finite number per row.")
    end = terminal | cut
    yield from _odd_flags(data, terminal, cut)
    if following is not None:
        unflagged = _breaks(obs, following, end, bad, where)
        end |= unflagged
        if unflagged.any():
            yield Notice(
                f"{unflagged.sum()} of the episodes have no end flag, the first ends at row "
                f"{np.flatnonzero(unflagged)[0]}, where 'next_observations' do not go on as the next row. They are "
                "taken as cut by time."
            )
    end[-1] = True
    number = 0
    for start, stop in _spans(end):
        last, true_end = stop, bool(terminal[stop - 1])
        if following is not None:
            states = np.concatenate([obs[start:stop], following[stop - 1 : stop]])
        elif true_end:
            states = np.concatenate([obs[start:stop], obs[stop - 1 : stop]])
        else:
            states, last = obs[start:stop], stop - 1
        if last > start:
            logs = None if log_prob is None else log_prob[start:last]
            if bad[start:stop].any():
                yield UserError(first_not_finite(data, f"{where}, episode {number}", slice(start, stop)))
            else:
                yield Episode(states, action[start:last], reward[start:last], true_end, logs)
            number += 1


def _odd_flags(data: Arrays, terminal: np.ndarray, cut: np.ndarray) -> Iterator[Notice]:
    """What is odd in the end flags of a file."""
    if not (terminal | cut).any():
        yield Notice(f"no end is flagged in any of its {len(terminal)} rows.")
    for text in both_flags(int((terminal & cut).sum()), int(terminal.sum()), int(cut.sum())):
        yield Notice(text)
    if "next_observations" in data:
        obs, following = data["observations"], data["next_observations"]
        goes_on = (following[:-1] == obs[1:]).all(axis=1) & (following[:-1] != obs[:-1]).any(axis=1) & terminal[:-1]
        if goes_on.any():
            yield Notice(
                f"{goes_on.sum()} of {terminal.sum()} terminals are in the middle, the first at row "
                f"{np.flatnonzero(goes_on)[0]}: the row after goes on from their next observation. Clear such flags if "
                "the episode does not end there."
            )


def _spans(end: np.ndarray) -> Iterator[tuple[int, int]]:
    """The rows start to stop - 1 up to each end; nothing after the last."""
    stops = [int(row) + 1 for row in np.flatnonzero(end)]
    return zip([0, *stops[:-1]], stops, strict=True) if stops else iter(())


def _breaks(obs: np.ndarray, following: np.ndarray, end: np.ndarray, bad: np.ndarray, where: str) -> np.ndarray:
    """Rows [N] bool inside an episode, and not bad, whose next observation is not that of the row after."""
    broken = np.zeros_like(end)
    same = np.isclose(following[:-1], obs[1:], rtol=1e-5, atol=1e-5).all(axis=1)
    broken[:-1] = ~same & ~end[:-1] & ~bad[:-1] & ~bad[1:]
    inside = int((~end[:-1]).sum())
    if broken.sum() > inside / 2:
        raise UserError(
            f"{where}: 'next_observations' differ from the observations of the rows after in {broken.sum()} of "
            f"{inside} rows, first at row {np.flatnonzero(broken)[0]}. They are damaged, or the rows are shuffled: "
            "remove them if the rows are in order."
        )
    return broken


# D4RL's readers -------------------------------------------------------------------------------------------------------


def _arrays(
    source: Mapping[str, np.ndarray] | str | Path, wanted: tuple[str, ...] | None
) -> tuple[Arrays, str | None, str]:
    """Checked arrays, the D4RL name if known, and what to call the source in errors."""
    if isinstance(source, Mapping):
        data = {key: np.asarray(value) for key, value in source.items()}
        check(data, "the data")
        return data, None, "the data"
    name, file = locate(source)
    data = read(verified(name, file), wanted)
    check(data, str(file))
    return data | {key: data[key].reshape(-1) for key in ("rewards", "terminals")}, name, str(file)


def qlearning_dataset(
    source: Mapping[str, np.ndarray] | str | Path,
    terminate_on_end: bool = False,
    *,
    max_episode_steps: int | None = None,
) -> Arrays:
    """Transitions exactly as `d4rl.qlearning_dataset` (D4RL 1.1) gives them, its habits included.

    The next observation is the next row's, so the file's last row is lost; rows at a time-out are left out, terminal or
    not, unless `terminate_on_end`, which keeps them with the first observation of the next episode (and, as in D4RL,
    does not set their terminal flag). Without `timeouts` D4RL counts steps from 1 after a terminal, so that a time-out
    is found one row early; `trajectories` counts from 0.

    Args:
        source: arrays by D4RL's names, a file, or the name of a dataset.
        max_episode_steps: the environment's limit, needed where there are no `timeouts` and no D4RL name.

    Returns:
        observations, actions, next_observations, rewards, all float32, and terminals, bool, with M <= N - 1 rows.

    Raises:
        UserError: as for `trajectories`, or arrays that are missing, disagree in length or hold other than numbers.
    """
    data, name, where = _arrays(source, (*REQUIRED, "timeouts"))
    terminal = data["terminals"].reshape(-1) == 1
    keep = np.ones(len(terminal) - 1, dtype=bool)
    if not terminate_on_end:
        keep = ~cut_rows(data, terminal, name, max_episode_steps, where, after_terminal=1, after_cut=0)[:-1]
    if not keep.any():
        fields = ("observations", "actions", "next_observations", "rewards", "terminals")
        return {field: np.array([]) for field in fields}
    rows = np.flatnonzero(keep)
    obs = data["observations"].astype(np.float32)
    return {
        "observations": obs[rows],
        "actions": data["actions"][rows].astype(np.float32),
        "next_observations": obs[rows + 1],
        "rewards": data["rewards"][rows].astype(np.float32),
        "terminals": terminal[rows],
    }


def sequence_dataset(
    source: Mapping[str, np.ndarray] | str | Path, *, max_episode_steps: int | None = None
) -> Iterator[Arrays]:
    """Episodes exactly as `d4rl.sequence_dataset` (D4RL 1.1) gives them: slices of every field, up to each end.

    An end is a terminal or a time-out; rows after the last one are left out, and no next observation is added. The one
    difference: fields called `metadata`, on which D4RL's function fails, are left out. Without `timeouts` its step
    counter starts at 1 from the second episode on.

    Raises:
        UserError: as for `qlearning_dataset`, also for other fields without one entry per row.
    """
    data, name, where = _arrays(source, None)
    data = {key: array for key, array in data.items() if "metadata" not in key}
    terminal = data["terminals"].reshape(-1) == 1
    for key, array in data.items():
        if array.ndim == 0 or len(array) != len(terminal):
            raise UserError(
                f"{where}: {key!r} has shape {array.shape} beside {len(terminal)} rows of 'rewards'. Leave it out."
            )
    end = terminal | cut_rows(data, terminal, name, max_episode_steps, where, after_terminal=1, after_cut=1)
    return ({key: array[start:stop].copy() for key, array in data.items()} for start, stop in _spans(end))


# Writing --------------------------------------------------------------------------------------------------------------


def write(path: str | Path, trajectories: Trajectories) -> Path:
    """Write a store as a D4RL HDF5 file, whole or not at all: gzip, raw units, `next_observations` and `timeouts` too.

    The spec goes into an attribute, which D4RL's readers do not see, so that `trajectories` gives back the same
    episodes with the same fields and bounds. Log-probabilities become `infos/action_log_probs`.

    Raises:
        UserError: the file exists already, or the disk refuses.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten. Remove it, or write to another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            temporary = Path(folder) / path.name
            with h5py.File(temporary, "w") as file:
                _fill(file, trajectories)
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write the D4RL file {path}: {error}.") from error
    return path


def _fill(file: h5py.File, store: Trajectories) -> None:
    with Interrupt() as interrupt:
        for name, (array, rows) in columns(store).items():
            shape = (len(rows), *array.shape[1:])
            dataset = file.create_dataset(name, shape, array.dtype, compression="gzip", chunks=True)
            for start in range(0, len(rows), _SLICE):
                interrupt.check()
                dataset[start : start + _SLICE] = array[rows[start : start + _SLICE]]
    file.attrs["offline_cai"] = json.dumps(store.spec.to_json())


def columns(store: Trajectories) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A store's steps by D4RL's names: an array of the store and which rows of it, so that nothing large is copied."""
    rows, last = store.step_rows(), np.zeros(len(store.obs), dtype=bool)
    last[store.offsets[1:] - 2] = True
    true_end = np.zeros_like(last)
    true_end[store.offsets[1:][store.terminal] - 2] = True
    found = {
        "observations": (store.obs, rows),
        "actions": (store.action, rows),
        "rewards": (store.reward, rows),
        "terminals": (true_end, rows),
        "timeouts": (last & ~true_end, rows),
        "next_observations": (store.obs, rows + 1),
    }
    return found if store.log_prob is None else found | {LOG_PROB: (store.log_prob, rows)}
