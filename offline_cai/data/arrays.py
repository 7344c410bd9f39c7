"""Own data as a dataset, without an environment: rows by D4RL's names or episodes, from Python or an `.npz` file.

What an action may be is declared, never guessed from the data.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from offline_cai.core import Box, Discrete, Episode, Field, Spec
from offline_cai.data import d4rl
from offline_cai.data.cache import converted
from offline_cai.data.d4rl_file import FIELDS, LOG_PROB, Arrays, check_fields, parse_spec
from offline_cai.data.intake import Reading
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError, did_you_mean

ROWS = (*FIELDS, "log_probs")
DECLARED = ("spec", "action_low", "action_high", "action_n")
_SLICE = 1 << 16


def dataset(data: Mapping[str, Any] | Iterable[Episode], spec: Spec, path: Path | None = None) -> Trajectories:
    """A store of one's own data.

    Args:
        data: NumPy arrays or CPU tensors by name, rows of episodes one after another: `observations` [N, O], `actions`
            [N, A], `rewards`, `terminals` (a true end) and `timeouts` (the last row of an episode that was cut) [N],
            and, where known, `next_observations` [N, O] and `log_probs` [N]; names with a slash are passed over.
            Without `next_observations` nobody knows what followed the last row of a cut episode: that transition is
            left out. Or episodes, from a generator too; their arrays may be tensors.
        spec: the fields of an observation and the bounds of an action.
        path: a new folder that the store is written to, in bounded memory, and mapped from; None: it stays in memory.

    Raises:
        UserError: a missing, unknown or damaged array, or a damaged episode, by name; `path` exists already.
    """
    where = "the data"
    if isinstance(data, Mapping):
        rows = _rows({name: _array(value) for name, value in data.items()}, where)
        found: Iterable[Reading] = d4rl.readings(rows, None, None, where)
    else:
        found = (_plain(episode, where) for episode in data)
    if path is None:
        return Trajectories.from_episodes(spec, found, where)
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten. Remove it, or write to another name.")
    Trajectories.write(path, spec, found, where)
    return Trajectories.open(path)


def _plain(episode: Episode, where: str) -> Episode:
    """An episode whose arrays are NumPy's."""
    if not isinstance(episode, Episode):
        raise UserError(f"{where}: one of its episodes is a {type(episode).__name__}, not an offline_cai.core.Episode.")
    obs, action, reward, terminal, log_prob = episode
    logs = None if log_prob is None else _array(log_prob)
    if np.size(terminal) != 1:
        raise UserError(f"{where}: 'terminal' of an episode is one flag, not {np.size(terminal)} of them.")
    return Episode(_array(obs), _array(action), _array(reward), bool(terminal), logs)


def _array(value: Any) -> np.ndarray:
    try:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; sparse tensors; types that NumPy has not
        raise UserError(f"the data hold what is no array of numbers ({error}). Convert it first.") from error


def _rows(data: Arrays, where: str) -> Arrays:
    """Checked arrays by D4RL's names, observations and actions a row of numbers each."""
    for name in data:
        if name not in ROWS and "/" not in str(name):
            raise UserError(
                f"{where}: there is no place for {name!r}; {did_you_mean(str(name), ROWS)} Leave it out, or call it "
                f"'infos/{name}', which is passed over."
            )
    if "timeouts" not in data:
        raise UserError(
            f"{where} has no 'timeouts', so nobody knows where a time limit cut episodes. Give one flag per row; all "
            "are False where only terminals end episodes."
        )
    check_fields(data, where)
    rows = {name: data[name] for name in ROWS if name in data}
    for name in ("observations", "actions", "next_observations"):
        if name in rows and rows[name].ndim > 2:
            raise UserError(f"{where}: {name!r} have shape {rows[name].shape}, not [rows, width]: flatten each row.")
        if name in rows:
            rows[name] = rows[name].reshape(len(rows[name]), -1)
    if (log_probs := rows.pop("log_probs", None)) is not None:
        if log_probs.size != len(rows["rewards"]) or log_probs.dtype.kind != "f" or not np.isfinite(log_probs).all():
            raise UserError(
                f"{where}: 'log_probs' have to be one finite fraction per row. Mend them or leave them out."
            )
        rows[LOG_PROB] = log_probs
    return rows


# Files ---------------------------------------------------------------------------------------------------------------


def trajectories(source: str | Path, repair: bool = False) -> Trajectories:
    """The store of an `.npz` file: converted once, mapped afterwards.

    The file holds the arrays of `dataset` by name, and declares what they mean: either `spec`, a string with the JSON
    of `Spec.to_json`, as `write` leaves it; or `action_low` and `action_high`, one number for all components or one for
    each; or `action_n`, likewise, the number of choices, which count from 0. Without `spec` an observation has the one
    field "observation". Nothing in it is executed (`allow_pickle=False`). `repair` leaves damaged episodes out.

    Raises:
        UserError: no such file, another kind of file, or as for `dataset`.
    """
    path = Path(source)
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}. Give the path of an .npz file with arrays by D4RL's names.")

    def read() -> tuple[Spec, Iterator[Reading]]:
        data = _read(path)
        declared = {name: data.pop(name) for name in DECLARED if name in data}
        rows = _rows(data, str(path))
        return _spec(declared, rows, str(path)), d4rl.readings(rows, None, None, str(path))

    return converted(f"npz/{path.stem}", path, read, repair)


def _read(path: Path) -> Arrays:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no .npz: it is damaged or something else. Write it again, with numpy.savez say.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name in (*ROWS, *DECLARED) or "/" not in name}
    except Exception as error:  # NumPy and zipfile raise OSError, ValueError, BadZipFile, zlib.error and others
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())}). It is damaged, or holds "
            "Python objects, which are not loaded: write it again with arrays of numbers."
        ) from error


def _spec(declared: Arrays, rows: Arrays, where: str) -> Spec:
    if "spec" in declared:
        return parse_spec(str(declared["spec"]), f"{where}: 'spec'")
    fields, width = (Field("observation", rows["observations"].shape[1]),), rows["actions"].shape[1]
    try:
        bounds = {name: np.broadcast_to(array, width).astype(float).tolist() for name, array in declared.items()}
        if "action_n" in bounds:
            if len(bounds) > 1 or any(n != int(n) for n in bounds["action_n"]):
                raise ValueError("'action_n' are whole numbers, and stand without bounds")
            return Spec(fields, Discrete(tuple(map(int, bounds["action_n"])), (0,) * width))
        return Spec(fields, Box(tuple(bounds["action_low"]), tuple(bounds["action_high"])))
    except KeyError:
        raise UserError(
            f"{where} does not say what an action may be. Add the arrays 'action_low' and 'action_high', or 'action_n' "
            "for choices, or 'spec', the JSON of a Spec, as offline_cai.data.arrays.write does."
        ) from None
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{where}: {', '.join(declared)} do not say what an action may be: {error}") from error


def write(path: str | Path, store: Trajectories) -> Path:
    """Write a store as an `.npz` file, whole or not at all and in bounded memory.

    `trajectories` gives the same store back, bit for bit.

    Raises:
        UserError: the file exists already, or the disk refuses.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} exists already and is not overwritten. Remove it, or write to another name.")
    names = {LOG_PROB: "log_probs"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            temporary = Path(folder) / path.name
            with zipfile.ZipFile(temporary, "w") as archive:
                for name, (array, rows) in d4rl.columns(store).items():
                    _write_array(archive, names.get(name, name), array, rows)
                with archive.open("spec.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(json.dumps(store.spec.to_json())), allow_pickle=False)
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write the file {path}: {error}.") from error
    return path


def _write_array(archive: zipfile.ZipFile, name: str, array: np.ndarray, rows: np.ndarray) -> None:
    """The numbered rows of an array, a bounded part at a time."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": (len(rows), *array.shape[1:])}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_2_0(member, header)
        for start in range(0, len(rows), _SLICE):
            member.write(array[rows[start : start + _SLICE]].tobytes())
