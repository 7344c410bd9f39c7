"""The trajectory store: memory-mapped rows on disk, written once and never changed.

Rows, not transitions: one row per time and one extra row per episode. The extra row holds the last state with a zero
action and reward, so last states are right, no next state is stored twice, and one index space serves transitions,
windows and whole episodes. A row packs [observation, action, reward, log-probability if known] as float32, so that one
gather reads all that a batch needs.
"""

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.signal import lfilter

from offline_cai.core import Chunk, Episode, Spec
from offline_cai.data.intake import Intake, Reading
from offline_cai.errors import Notice, UserError

FORMAT = 3
FILES = {"rows": np.float32, "end": np.int64, "offsets": np.int64, "terminal": np.bool_}


class Trajectories:
    """Episodes in flat arrays, raw units.

    Attributes:
        rows: float32 [N, W], N = steps + episodes: observation, action, reward and, if known, log-probability.
        end: int64 [N]; for each row the extra row of its episode.
        offsets: int64 [E+1]; episode e is rows offsets[e] to offsets[e+1] - 1, the last of them the extra row.
        terminal: bool [E]; True where the episode truly ended, False where a time limit cut it.
        info: where the data came from.
        path: the folder it is mapped from, None for a store in memory.
    """

    path: Path | None = None

    def __init__(self, spec: Spec, arrays: Mapping[str, np.ndarray], info: dict[str, Any] | None = None) -> None:
        self.spec, self.info = spec, info or {}
        self.rows, self.end = arrays["rows"], arrays["end"]
        self.offsets, self.terminal = arrays["offsets"], arrays["terminal"]
        width, known = spec.obs_width + spec.action_width + 1, self.rows.shape[-1]
        shapes_fit = self.rows.ndim == 2 and known in (width, width + 1) and self.end.shape == (len(self.rows),)
        if not shapes_fit or self.offsets.shape != (len(self.terminal) + 1,) or self.offsets[-1] != len(self.rows):
            raise UserError(f"the store's arrays do not fit each other or its spec ({known} columns): it is damaged.")

    # Columns ---------------------------------------------------------------------------------------------------------

    @property
    def obs(self) -> np.ndarray:
        """[N, O]"""
        return self.rows[:, : self.spec.obs_width]

    @property
    def action(self) -> np.ndarray:
        """[N, A]; zero on the extra rows."""
        return self.rows[:, self.spec.obs_width : self.spec.obs_width + self.spec.action_width]

    @property
    def reward(self) -> np.ndarray:
        """[N]; zero on the extra rows."""
        return self.rows[:, self.spec.obs_width + self.spec.action_width]

    @property
    def log_prob(self) -> np.ndarray | None:
        """[N], of the policy that collected it, in [-1, 1] action space; zero on the extra rows."""
        column = self.spec.obs_width + self.spec.action_width + 1
        return self.rows[:, column] if self.rows.shape[1] > column else None

    # Counts and sums -------------------------------------------------------------------------------------------------

    @property
    def num_episodes(self) -> int:
        return len(self.terminal)

    @property
    def num_steps(self) -> int:
        return len(self.rows) - self.num_episodes

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, int64 [E]."""
        return np.diff(self.offsets) - 1

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, float64 [E]."""
        return np.add.reduceat(self.reward.astype(np.float64), self.offsets[:-1])

    def step_rows(self, episodes: np.ndarray | None = None) -> np.ndarray:
        """Rows that hold a step (all but the extra ones), int64 [steps], of all episodes or of those numbered."""
        if episodes is None:
            keep = np.ones(len(self.rows), dtype=bool)
            keep[self.offsets[1:] - 1] = False
            return np.flatnonzero(keep)
        numbers, last = np.asarray(episodes), self.num_episodes - 1
        if numbers.dtype.kind not in "iu" or not len(numbers) or not 0 <= numbers.min() <= numbers.max() <= last:
            raise UserError(
                f"episodes are given by their numbers, one at least, from 0 to {last}, and {numbers.dtype} "
                f"{numbers[:3].tolist()} is not that. A mask becomes numbers by numpy.flatnonzero."
            )
        return np.concatenate([np.arange(self.offsets[e], self.offsets[e + 1] - 1) for e in numbers])

    def return_to_go(self, discount: float) -> np.ndarray:
        """Discounted sum of rewards from each row to the end of its episode, float32 [N]."""
        out, reward = np.empty(len(self.rows), dtype=np.float32), self.reward
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            out[start:stop] = discounted_sums(reward[start:stop], discount)
        return out

    def chunks(self, discount: float = 1.0, rows: int = 1 << 18) -> Iterator[Chunk]:
        """All steps, a bounded part at a time: what normalisers are fitted to."""
        returns = self.return_to_go(discount)
        for start in range(0, len(self.rows), rows):
            part = slice(start, start + rows)
            steps = self.end[part] > np.arange(start, min(start + rows, len(self.rows)))
            yield Chunk(self.obs[part][steps], self.action[part][steps], returns[part][steps])

    def episode(self, number: int) -> Episode:
        """Episode `number`, as views of the store."""
        start, last = self.offsets[number], self.offsets[number + 1] - 1
        log_prob = None if self.log_prob is None else self.log_prob[start:last]
        obs, action, reward = self.obs[start : last + 1], self.action[start:last], self.reward[start:last]
        return Episode(obs, action, reward, bool(self.terminal[number]), log_prob)

    def episodes(self) -> Iterator[Episode]:
        return (self.episode(number) for number in range(self.num_episodes))

    # Making and opening ----------------------------------------------------------------------------------------------

    @classmethod
    def from_episodes(
        cls, spec: Spec, episodes: Iterable[Reading], source: str = "the data", repair: bool = False
    ) -> Self:
        """A store in memory. With `repair` damaged episodes are left out, and `info["dropped"]` says which and why.

        Raises:
            UserError: no episodes, or a damaged one; it names the source, the episode, the field and the mend.
        """
        intake = Intake(spec, source, repair)
        rows, lengths, terminal = (np.concatenate(parts) for parts in zip(*intake.blocks(episodes), strict=True))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        arrays = {"rows": rows, "offsets": offsets, "terminal": terminal, "end": np.repeat(offsets[1:] - 1, lengths)}
        return cls(spec, arrays, _noted(intake, {}))

    @classmethod
    def write(
        cls,
        path: Path,
        spec: Spec,
        episodes: Iterable[Reading],
        source: str = "the data",
        info: dict[str, Any] | None = None,
        repair: bool = False,
    ) -> None:
        """Write episodes to a new store, whole or not at all, in bounded memory. A store that is there already is kept.

        What is odd in the data is given as a Notice and kept as `info["warnings"]`. With `repair` damaged episodes
        are left out, and `info["dropped"]` says which and why.

        Raises:
            UserError: as `from_episodes`, or the disk refuses.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        except OSError as error:
            raise UserError(f"cannot write the trajectory store {path}: {error}.") from None
        try:
            _write_files(temporary, episodes, Intake(spec, source, repair), info or {})
            temporary.chmod(0o755)
            if not path.exists():
                os.replace(temporary, path)
        except OSError as error:
            if not (path / "meta.json").exists():  # another process may have finished the same store first
                raise UserError(f"cannot write the trajectory store {path}: {error}.") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def save(self, path: Path, info: dict[str, Any] | None = None) -> None:
        """`write` what is in this store."""
        self.write(path, self.spec, self.episodes(), info=info or self.info)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a saved store into memory; costs the same for any size.

        Raises:
            UserError: there is no store, its meta.json was changed, or its files do not have the sizes that it was
                written with.
        """
        try:
            meta = _meta(path)
            arrays = {name: _mapped(path / f"{name}.bin", dtype, meta["shapes"][name]) for name, dtype in FILES.items()}
            store = cls(Spec.from_json(meta["spec"]), arrays, meta["info"])
            store.path = path
            return store
        except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"cannot open the trajectory store {path}: {error} Delete it and convert again.") from None


def discounted_sums(reward: np.ndarray, discount: float) -> np.ndarray:
    """Sums of the rewards [T] from each time on, those later discounted, float64 [T]."""
    return lfilter([1.0], [1.0, -discount], reward[::-1].astype(np.float64))[::-1]


def digests(path: Path) -> dict[str, str]:
    """The checksums that a store's files were written with."""
    return json.loads((path / "meta.json").read_text())["sha256"]


def verify(path: Path) -> None:
    """Compare every byte of a saved store with the checksums that it was written with.

    Raises:
        UserError: a file differs; it is named.
    """
    Trajectories.open(path)
    expected = digests(path)
    for name in FILES:
        with (path / f"{name}.bin").open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected[name]:
                raise UserError(f"{path / name}.bin differs from what was written. Delete the store and convert again.")


def _meta(path: Path) -> dict[str, Any]:
    meta = json.loads((path / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise UserError(f"it has format {meta['format']}, and this version reads {FORMAT}.")
    if meta.pop("checksum") != _checksum(meta):
        raise UserError("its meta.json differs from what was written.")
    return meta


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _mapped(file: Path, dtype: type, shape: Sequence[int]) -> np.ndarray:
    array = np.memmap(file, dtype, mode="c", shape=tuple(shape))
    if file.stat().st_size != array.nbytes:
        raise UserError(f"{file.name} is longer than it was written.")
    return array


def _noted(intake: Intake, info: dict[str, Any]) -> dict[str, Any]:
    """`info` with what an intake noted; what is new to it is given as a Notice too."""
    known = info.get("warnings", [])
    told = [text for text in intake.warnings if text not in known]
    out = info | ({"warnings": known + told} if known + told else {})
    if intake.repair:
        out["dropped"] = intake.dropped
    if intake.dropped:
        told.insert(0, f"left out {len(intake.dropped)} damaged episodes; the first: {intake.dropped[0]}")
    for text in told:
        warnings.warn(f"{intake.source}: {text}", Notice, stacklevel=4)
    return out


def _write_files(folder: Path, episodes: Iterable[Reading], intake: Intake, info: dict[str, Any]) -> None:
    digests = {name: hashlib.sha256() for name in FILES}
    offsets, terminal, columns = [np.zeros(1, dtype=np.int64)], [], 0
    with (folder / "rows.bin").open("wb") as row_file, (folder / "end.bin").open("wb") as end_file:
        for rows, lengths, true_end in intake.blocks(episodes):
            offsets.append(offsets[-1][-1] + np.cumsum(lengths))
            terminal.append(true_end)
            columns = rows.shape[1]
            ends = np.repeat(offsets[-1] - 1, lengths)
            for name, file, array in (("rows", row_file, rows), ("end", end_file, ends)):
                file.write(array.data)
                digests[name].update(array.data)
        for file in (row_file, end_file):
            file.flush()
            os.fsync(file.fileno())
    small = {"offsets": np.concatenate(offsets), "terminal": np.concatenate(terminal)}
    for name, array in small.items():
        (folder / f"{name}.bin").write_bytes(array.tobytes())
        digests[name].update(array.tobytes())
    count = int(small["offsets"][-1])
    shapes = {"rows": [count, columns], "end": [count], **{name: [len(array)] for name, array in small.items()}}
    sha256 = {name: digest.hexdigest() for name, digest in digests.items()}
    meta = {"format": FORMAT, "spec": intake.spec.to_json(), "shapes": shapes, "sha256": sha256}
    meta = json.loads(json.dumps(meta | {"info": _noted(intake, info)}))
    (folder / "meta.json").write_text(json.dumps(meta | {"checksum": _checksum(meta)}, indent=1))
