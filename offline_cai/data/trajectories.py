"""The trajectory store: memory-mapped rows on disk, written once and never changed.

Rows, not transitions: one row per time and one extra row per episode. The extra row holds the last state with a zero
action and reward, so last states are right, no next state is stored twice, and one index space serves transitions,
windows and whole episodes.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from scipy.signal import lfilter

from offline_cai.core import Episode, Spec
from offline_cai.errors import UserError

FORMAT = 1
ARRAYS = ("obs", "action", "reward", "offsets", "terminal")


class Trajectories:
    """Episodes in flat arrays, raw units.

    Attributes:
        obs: float32 [N, O], N = steps + episodes.
        action: float32 [N, A]; zero on the extra row of each episode.
        reward: float32 [N]; zero on the extra row.
        offsets: int64 [E+1]; episode e is rows offsets[e] to offsets[e+1] - 1, the last of them the extra row.
        terminal: bool [E]; True where the episode truly ended, False where a time limit cut it.
        log_prob: float32 [N] or None; of the policy that collected it.
        info: where the data came from.
    """

    def __init__(self, spec: Spec, arrays: dict[str, np.ndarray], info: dict[str, Any] | None = None) -> None:
        self.spec, self.info = spec, info or {}
        self.obs, self.action, self.reward = arrays["obs"], arrays["action"], arrays["reward"]
        self.offsets, self.terminal = arrays["offsets"], arrays["terminal"]
        self.log_prob: np.ndarray | None = arrays.get("log_prob")
        self._check_layout()

    def _check_layout(self) -> None:
        rows, episodes = len(self.obs), len(self.terminal)
        shapes = {
            "obs": (rows, self.spec.obs_width),
            "action": (rows, self.spec.action_width),
            "reward": (rows,),
            "offsets": (episodes + 1,),
        }
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise UserError(
                    f"the store's {name} has shape {getattr(self, name).shape}, not {shape}: it is damaged."
                )
        if not episodes or self.offsets[0] != 0 or self.offsets[-1] != rows or np.diff(self.offsets).min() < 2:
            raise UserError("the store's offsets do not describe its rows (or there is no episode): it is damaged.")

    @property
    def num_episodes(self) -> int:
        return len(self.terminal)

    @property
    def num_steps(self) -> int:
        return len(self.obs) - self.num_episodes

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each episode, int64 [E]."""
        return np.diff(self.offsets) - 1

    @property
    def returns(self) -> np.ndarray:
        """Undiscounted return of each episode, float64 [E]."""
        return np.add.reduceat(self.reward.astype(np.float64), self.offsets[:-1])

    @property
    def step_rows(self) -> np.ndarray:
        """Rows that hold a step, int64 [steps]: all but the extra ones."""
        mask = np.ones(len(self.obs), dtype=bool)
        mask[self.offsets[1:] - 1] = False
        return np.flatnonzero(mask)

    def episode_end(self) -> np.ndarray:
        """For each row the extra row of its episode, int64 [N]."""
        return np.repeat(self.offsets[1:] - 1, np.diff(self.offsets))

    def return_to_go(self, discount: float) -> np.ndarray:
        """Discounted sum of rewards from each row to the end of its episode, float32 [N]."""
        out = np.empty(len(self.reward), dtype=np.float32)
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            out[start:stop] = lfilter([1.0], [1.0, -discount], self.reward[start:stop][::-1])[::-1]
        return out

    def episodes(self) -> Iterator[Episode]:
        for start, stop, terminal in zip(self.offsets[:-1], self.offsets[1:], self.terminal, strict=True):
            last = stop - 1
            log_prob = None if self.log_prob is None else self.log_prob[start:last]
            yield Episode(
                self.obs[start:stop], self.action[start:last], self.reward[start:last], bool(terminal), log_prob
            )

    # Making, saving, opening ---------------------------------------------------------------------------------------

    @classmethod
    def from_episodes(cls, spec: Spec, episodes: Iterable[Episode], source: str = "the data") -> Self:
        """A store in memory.

        Raises:
            UserError: no episodes, or a damaged one; it names the source, the episode, the field and the mend.
        """
        parts: dict[str, list[np.ndarray]] = {"obs": [], "action": [], "reward": [], "log_prob": []}
        terminal = []
        for number, episode in enumerate(episodes):
            check_episode(spec, episode, f"{source}, episode {number}")
            parts["obs"].append(np.asarray(episode.obs, dtype=np.float32))
            for name in ("action", "reward", "log_prob"):
                steps = getattr(episode, name)
                if steps is not None:
                    steps = np.asarray(steps, dtype=np.float32)
                    parts[name].append(np.concatenate([steps, np.zeros_like(steps[:1])]))
            terminal.append(bool(episode.terminal))
        if not terminal:
            raise UserError(f"{source} holds no episodes: there is nothing to train on.")
        if parts["log_prob"] and len(parts["log_prob"]) != len(terminal):
            raise UserError(f"{source}: some episodes have log-probabilities and some do not: give all or none.")
        arrays = {name: np.concatenate(values) for name, values in parts.items() if values}
        arrays["offsets"] = np.cumsum([0, *(len(obs) for obs in parts["obs"])], dtype=np.int64)
        arrays["terminal"] = np.array(terminal)
        return cls(spec, arrays)

    def save(self, path: Path, info: dict[str, Any] | None = None) -> None:
        """Write the store to a new folder: whole or not at all. An existing store of the same path is kept."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        try:
            for name in (*ARRAYS, "log_prob"):
                if getattr(self, name) is not None:
                    np.save(temporary / f"{name}.npy", getattr(self, name), allow_pickle=False)
            meta = {"format": FORMAT, "spec": self.spec.to_json(), "info": info or self.info}
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
            if not path.exists():
                os.replace(temporary, path)
        except OSError as error:
            if not (path / "meta.json").exists():  # another process may have finished the same store first
                raise UserError(f"cannot write the trajectory store {path}: {error}.") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a saved store into memory; costs the same for any size.

        Raises:
            UserError: there is no store, or it is damaged.
        """
        try:
            meta = json.loads((path / "meta.json").read_text())
            names = [name for name in (*ARRAYS, "log_prob") if (path / f"{name}.npy").exists()]
            arrays = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
            if meta["format"] != FORMAT:
                raise UserError(f"{path} has store format {meta['format']}, this version reads {FORMAT}. Delete it.")
            return cls(Spec.from_json(meta["spec"]), arrays, meta["info"])
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"cannot open the trajectory store {path}: {error} Delete it and convert again.") from None


def check_episode(spec: Spec, episode: Episode, where: str) -> None:
    """Raise a UserError that names the field, the row and the mend if the episode is damaged."""
    obs, action, reward = np.asarray(episode.obs), np.asarray(episode.action), np.asarray(episode.reward)
    steps = len(reward)
    widths = {"observations": (obs, steps + 1, spec.obs_width), "actions": (action, steps, spec.action_width)}
    for name, (array, rows, width) in widths.items():
        if array.ndim != 2 or array.shape[1] != width:
            raise UserError(f"{where}: {name} have shape {array.shape}, but the spec says width {width}.")
        if len(array) != rows:
            raise UserError(
                f"{where}: {len(array)} {name} for {steps} rewards; there should be {rows}. Drop or repair it."
            )
    if steps == 0:
        raise UserError(f"{where}: no steps. Drop it.")
    for name, array in (("observations", obs), ("actions", action), ("rewards", reward)):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            raise UserError(
                f"{where}: {name} hold {array[tuple(bad[0])]} at row {bad[0][0]} ({len(bad)} such numbers in all). "
                "Drop the episode, or collect or download the dataset again."
            )
    low, high = np.array(spec.action.low), np.array(spec.action.high)
    outside = np.argwhere((action < low - 1e-4) | (action > high + 1e-4))
    if len(outside):
        row, column = outside[0]
        raise UserError(
            f"{where}: action {action[row, column]:.4g} at row {row}, component {column} is outside the bounds "
            f"[{low[column]:.4g}, {high[column]:.4g}]. Clip the actions as the environment did, or mend the bounds."
        )
