"""Replay: the store's rows, growing while environments are stepped, and kept on disk in segments that never change.

Each environment has a lane of its own, in which the rows of an episode stand one after the other as in the store, so
that windows are cut by the same gather. The last row of a lane is open: it holds the latest observation, whose action
is to come. To the gather it is the last row of an episode that was cut there.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from offline_cai.core import Batch, Episode, Spec
from offline_cai.data.trajectories import Trajectories, discounted_sums
from offline_cai.data.windows import ABOUT, Cut, Rows, about_rows
from offline_cai.errors import UserError
from offline_cai.files import write_bytes

STEP, CUT, TRUE_END = 0, 1, 2  # kinds of rows in a segment: of a step; the last of an episode that was cut, or ended

ROUNDS = 1000  # of draws, before it is taken for granted that no window fits


class _Columns(NamedTuple):
    """The arrays of `Rows`, and for the last row of an episode whether that is a true end."""

    values: np.ndarray
    end: np.ndarray
    about: np.ndarray
    true_end: np.ndarray


class _Segment(NamedTuple):
    """A file of rows that checkpoints name, and the numbers [N] of the rows that follow it in each lane."""

    file: str
    sha256: str
    end: np.ndarray


class Replay:
    """The latest rows of N environments, beside those of a dataset if there is one.

    The rows of a lane are numbered from its first one on; number plus `_shift` is the place in the arrays.
    Log-probabilities are NaN where the policy that acted told none, and returns-to-go where an episode goes on.

    Args:
        spec: of the environments.
        lanes: N, how many environments there are.
        capacity: rows to draw from, over all lanes: one for each step and one for each episode.
        discount: of the returns-to-go.
        dataset: data to draw from as well; they are copied into memory, and stay.

    Raises:
        UserError: a capacity of less than two rows for each lane, or a dataset of other observations or actions.
    """

    def __init__(
        self, spec: Spec, lanes: int, capacity: int, discount: float, dataset: Trajectories | None = None
    ) -> None:
        if capacity < 2 * lanes:
            raise UserError(f"a replay of {capacity} rows is too small for {lanes} environments: each needs two.")
        if dataset is not None and (dataset.spec.obs, dataset.spec.action) != (spec.obs, spec.action):
            raise UserError("the dataset's observations or actions are not the environment's: they cannot be mixed.")
        self.spec, self.lanes, self.discount = spec, lanes, discount
        self._keep, self._dataset = capacity // lanes, dataset
        self._offset = 0 if dataset is None else len(dataset.rows)
        self._clear()

    def _clear(self, size: int = 64) -> None:
        """Empty lanes with room for `size` rows each."""
        self._allocate(size)
        self._shift = self._bases
        self._open = np.zeros(self.lanes, dtype=np.int64)  # the open row
        self._start = np.zeros(self.lanes, dtype=np.int64)  # the first row of the episode in progress
        self._saved = np.zeros(self.lanes, dtype=np.int64)  # the first row that is in no segment yet
        self._segments: list[_Segment] = []

    def _allocate(self, size: int) -> None:
        n, width = self._offset + self.lanes * size, self.spec.obs_width + self.spec.action_width + 2
        self._size = size
        self._columns = _Columns(
            np.full((n, width), np.nan, dtype=np.float32),
            np.zeros(n, dtype=np.int64),
            np.zeros(n, dtype=ABOUT),
            np.zeros(n, dtype=bool),
        )
        if (data := self._dataset) is not None:
            part = slice(0, self._offset)
            self._columns.values[part, : data.rows.shape[1]] = data.rows
            self._columns.end[part], self._columns.about[part] = data.end, about_rows(data, self.discount)

    @property
    def _bases(self) -> np.ndarray:
        return self._offset + self._size * np.arange(self.lanes)

    # Growing ---------------------------------------------------------------------------------------------------------

    def begin(self, obs: np.ndarray) -> None:
        """Forget all lanes and begin an episode in each, with observations [N, O]."""
        self._clear()
        self._observe(np.arange(self.lanes), obs)

    def add(
        self,
        action: np.ndarray,
        reward: np.ndarray,
        log_prob: np.ndarray,
        obs: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        restart: np.ndarray,
    ) -> None:
        """One step of each lane: raw actions [N, A], rewards [N], log-probabilities [N], and the next obs [N, O].

        Where an episode `terminated` or was `truncated` [N], the next begins with that row of `restart` [N, O].
        """
        self._make_room()
        width, at = self.spec.obs_width, self._shift + self._open
        self._columns.values[at, width:] = np.column_stack([action, reward, log_prob])
        self._columns.about["exists"][at] = True
        self._open += 1
        self._observe(np.arange(self.lanes), obs)
        ended = np.flatnonzero(terminated | truncated)
        for lane in ended.tolist():
            self._close(lane, bool(terminated[lane]))
        self._open[ended] += 1
        self._start[ended] = self._open[ended]
        self._observe(ended, restart[ended])

    def _observe(self, lanes: np.ndarray, obs: np.ndarray) -> None:
        """Make the open rows of these lanes the last ones, so far, of their episodes."""
        at = self._shift[lanes] + self._open[lanes]
        self._columns.values[at] = 0
        self._columns.values[at, : self.spec.obs_width] = obs
        self._columns.about[at] = (np.nan, False, False)
        for first, last in zip(self._shift[lanes] + self._start[lanes], at, strict=True):
            self._columns.end[first : last + 1] = last

    def _close(self, lane: int, terminal: bool) -> None:
        """The open row of a lane is the last one of its episode."""
        first, last = self._shift[lane] + self._start[lane], self._shift[lane] + self._open[lane]
        self._columns.true_end[last] = terminal
        self._columns.about["terminal"][first:last][-1:] = terminal
        reward = self._columns.values[first : last + 1, self.spec.obs_width + self.spec.action_width]
        self._columns.about["returns"][first : last + 1] = discounted_sums(reward, self.discount)

    @property
    def _low(self) -> np.ndarray:
        """The first row of each lane that is drawn from."""
        return np.maximum(0, self._open + 1 - self._keep)

    @property
    def _first(self) -> np.ndarray:
        """The first row of each lane that is needed: to draw from, or to rebuild the environment."""
        return np.minimum(self._low, self._start)

    def _make_room(self) -> None:
        """Make sure of two more rows in each lane: needed rows move to its front, in larger arrays if they are many."""
        if (self._shift + self._open + 2 < self._bases + self._size).all():
            return
        first, count = self._first, self._open + 1 - self._first
        at, before = self._shift + first, self._columns
        kept = [_Columns(*(c[a : a + n].copy() for c in before)) for a, n in zip(at, count, strict=True)]
        if 2 * count.max() + 2 > self._size:
            self._allocate(2 * self._size)
        self._shift = self._bases - first
        for lane, base in enumerate(self._bases):
            kept[lane].end[:] += base - at[lane]
            for column, values in zip(self._columns, kept[lane], strict=True):
                column[base : base + len(values)] = values

    # Reading ---------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Rows:
        return Rows.of(*self._columns[:3])

    def draw(self, rng: np.random.Generator, n: int, span: int = 0) -> np.ndarray:
        """n rows [n] that hold a step, uniform over the dataset and the lanes; `span` steps of the episode lie ahead.

        Raises:
            UserError: no row is like that yet.
        """
        low = self._low
        counts = np.concatenate([[self._offset], self._open - low])
        ladder = counts.cumsum()
        begins = np.concatenate([[0], self._shift + low]) - (ladder - counts)
        drawn = np.empty(0, dtype=np.int64)
        for _ in range(ROUNDS):
            at = rng.integers(ladder[-1], size=n - len(drawn))
            at += begins[ladder.searchsorted(at, side="right")]
            at = at[at + max(span, 1) <= self._columns.end[at]]
            drawn = np.concatenate([drawn, at]) if len(drawn) else at
            if len(drawn) == n:
                return drawn
        raise UserError(
            f"no episode in the replay has {span} steps yet: begin with more random_steps, shorten the "
            "windows, or allow padding."
        )

    def latest(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The last steps of each lane, as first rows [P] of the pieces of episodes that they make, and their lanes [P].

        Each piece goes on to the end of its episode, or of its lane.
        """
        firsts: list[np.ndarray] = []
        for shift, low, stop in zip(self._shift, self._low, self._open, strict=True):
            rows = np.arange(shift + low, shift + stop)
            rows = rows[self._columns.end[rows] > rows][-steps:]
            firsts.append(rows[np.diff(rows, prepend=-2) > 1])
        return np.concatenate(firsts), np.repeat(np.arange(self.lanes), [len(first) for first in firsts])

    def current(self, lane: int) -> tuple[np.ndarray, np.ndarray]:
        """The observations [T+1, O] and actions [T, A] of the episode in progress."""
        o, a = self.spec.obs_width, self.spec.obs_width + self.spec.action_width
        first, last = self._shift[lane] + self._start[lane], self._shift[lane] + self._open[lane]
        rows = self._columns.values[first : last + 1].copy()
        return rows[:, :o], rows[:-1, o:a]

    def episodes(self) -> Iterator[Episode]:
        """What the lanes hold from the first beginning of an episode on, the ones in progress as if cut now.

        They are what `Trajectories` and the writers of datasets take; log-probabilities are left out unless all are
        known.
        """
        o, a = self.spec.obs_width, self.spec.obs_width + self.spec.action_width
        known = not any(np.isnan(self._columns.values[s + f : s + e, a + 1]).any() for s, f, e in self._lanes())
        for shift, number, stop in self._lanes():
            whole = number == 0
            while number < stop:
                first, last = shift + number, self._columns.end[shift + number]
                if whole and last > first:
                    rows = self._columns.values[first : last + 1]
                    log_prob = rows[:-1, a + 1] if known else None
                    true_end = bool(self._columns.true_end[last])
                    yield Episode(rows[:, :o], rows[:-1, o:a], rows[:-1, a], true_end, log_prob)
                whole, number = True, last + 1 - shift

    def _lanes(self) -> Iterable[tuple[int, int, int]]:
        """Shift, first needed row and open row of each lane."""
        return zip(self._shift.tolist(), self._first.tolist(), self._open.tolist(), strict=True)

    # Segments --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what is in no segment yet to a new one in `folder`, and tell what a checkpoint has to know.

        A file's name is made of its content, so a step that is done again writes the same file again.

        Raises:
            UserError: the disk refuses; the segments that are there are untouched.
        """
        begin, end = np.maximum(self._saved, self._first), self._open.copy()
        if (end > begin).any():
            rows = np.concatenate(
                [np.arange(b, e) for b, e in zip(self._shift + begin, self._shift + end, strict=True)]
            )
            true_end, last = self._columns.true_end[rows], self._columns.end[rows] == rows
            kind = np.where(last, np.where(true_end, TRUE_END, CUT), STEP).astype(np.uint8)
            data = save({"rows": self._columns.values[rows], "kind": kind, "begin": begin, "end": end})
            sha256 = hashlib.sha256(data).hexdigest()
            name = f"{sha256[:16]}.safetensors"
            write_bytes(folder / name, data)
            self._segments.append(_Segment(name, sha256, end))
            self._saved = end
        self._segments = [segment for segment in self._segments if (segment.end > self._first).any()]
        named = [{"file": segment.file, "sha256": segment.sha256} for segment in self._segments]
        return {"segments": named, "first": self._first.tolist()}

    def load(self, folder: Path, state: Mapping[str, Any], obs: np.ndarray) -> None:
        """Take up what `save` told, and the open rows' observations [N, O].

        Raises:
            UserError: a segment is missing, or differs from what was written.
        """
        first = np.array(state["first"], dtype=np.int64)
        values: list[list[np.ndarray]] = [[] for _ in first]
        kinds: list[list[np.ndarray]] = [[] for _ in first]
        segments = []
        for named in state["segments"]:
            arrays, at = _read(folder / named["file"], named["sha256"]), 0
            for lane, (begin, end) in enumerate(zip(arrays["begin"], arrays["end"], strict=True)):
                part = slice(at + min(max(0, first[lane] - begin), end - begin), at + end - begin)
                values[lane].append(arrays["rows"][part])
                kinds[lane].append(arrays["kind"][part])
                at += end - begin
            segments.append(_Segment(named["file"], named["sha256"], arrays["end"]))
        longest = max(sum(map(len, parts)) for parts in values)
        self._clear(max(64, 2 * longest + 4))
        self._shift = self._bases - first
        for lane in range(self.lanes):
            self._refill(lane, first[lane], values[lane], kinds[lane])
        self._saved, self._segments = self._open.copy(), segments
        self._observe(np.arange(self.lanes), obs)

    def _refill(self, lane: int, first: int, values: list[np.ndarray], kinds: list[np.ndarray]) -> None:
        """The rows of a lane, from number `first` on, and what follows from them."""
        self._open[lane] = self._start[lane] = first
        if not values:
            return
        rows, kind = np.concatenate(values), np.concatenate(kinds)
        base = self._shift[lane] + first
        self._columns.values[base : base + len(rows)] = rows
        self._columns.about[base : base + len(rows)] = (np.nan, True, False)
        self._columns.about["exists"][base : base + len(rows)] = kind == STEP
        for last in np.flatnonzero(kind != STEP):
            self._open[lane] = first + last
            self._columns.end[self._shift[lane] + self._start[lane] : base + last + 1] = base + last
            self._close(lane, bool(kind[last] == TRUE_END))
            self._start[lane] = first + last + 1
        self._open[lane] = first + len(rows)


class ReplayWindows:
    """Windows of a replay that goes on growing, uniform over the steps that it holds: a `Sampler`.

    Without `padding` a window has to fit into what there is of its episode.
    """

    def __init__(self, replay: Replay, horizon: int, stride: int = 1, padding: bool = True) -> None:
        self._replay, self._cut = replay, Cut(replay.spec, horizon, stride, replay.discount)
        self._span = 0 if padding else horizon * stride

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """First rows [n] of n windows; they hold until the replay grows."""
        return self._replay.draw(rng, n, self._span)

    def gather(self, items: np.ndarray, key: Tensor) -> Batch:
        return self._cut(self._replay.rows, items, key)


def _read(path: Path, sha256: str) -> dict[str, np.ndarray]:
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("it differs from what was written")
        return load(data)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the replay's segment {path} cannot be read: {error}. Take a checkpoint without it.") from None


def prune(folder: Path, states: Iterable[Mapping[str, Any]]) -> None:
    """Remove the segments that none of these `states`, as `Replay.save` told them, names."""
    named = {segment["file"] for state in states for segment in state["segments"]}
    for path in folder.glob("*"):
        if path.name not in named:
            path.unlink(missing_ok=True)
