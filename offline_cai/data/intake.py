"""The one way into a store: what a reader finds is checked and packed block by block.

A reader gives episodes; in the place of one that it finds damaged it gives the error, and goes on to the next. Between
them it may give a Notice about data that can be used, but are likely not what their makers meant.
"""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from offline_cai.core import Episode, Spec
from offline_cai.data.checks import check_episode, is_clean, oddities
from offline_cai.errors import Notice, UserError

Reading = Episode | UserError | Notice
BLOCK = 256  # readings that are packed and checked together


class Intake:
    """Packs what a reader of `source` gives. A damaged episode is an error; with `repair` it is left out.

    Attributes:
        warnings: what is odd in the data, a sentence each; complete after the last block.
    """

    def __init__(self, spec: Spec, source: str, repair: bool = False) -> None:
        self.spec, self.source, self.repair = spec, source, repair
        self.warnings: list[str] = []
        self._dropped: dict[int, str] = {}
        self._read = 0  # episodes, damaged ones included
        self._logged: bool | None = None  # whether they have log-probabilities

    @property
    def dropped(self) -> list[str]:
        """What is wrong with each episode that was left out, a sentence each, in their order."""
        return [self._dropped[number] for number in sorted(self._dropped)]

    def blocks(self, readings: Iterable[Reading]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Packed rows [n, W], lengths in rows [e] and true ends [e] of up to BLOCK episodes at a time.

        Raises:
            UserError: a damaged episode, by source, number, field and mend; or no episode at all.
        """
        iterator, kept = iter(readings), []
        while block := list(islice(iterator, BLOCK)):
            numbers, rows, terminal = self._sound(list(self._episodes(block)))
            if not rows:
                continue
            prints = [hash((part.tobytes(), end)) for part, end in zip(rows, terminal, strict=True)]
            lengths, true_end = np.array([len(part) for part in rows]), np.array(terminal)
            kept.append((np.array(numbers), lengths - 1, true_end, np.array(prints)))
            yield np.concatenate(rows), lengths, true_end
        if self.dropped and not kept:
            raise UserError(
                f"{self.source}: each of its {self._read} episodes is damaged, so none is left. The first: "
                f"{self.dropped[0]}"
            )
        if not kept:
            raise UserError(f"{self.source} holds no episodes: there is nothing to train on.")
        self.warnings += oddities(*(np.concatenate(parts) for parts in zip(*kept, strict=True)))

    def _episodes(self, block: Iterable[Reading]) -> Iterator[tuple[int, Episode]]:
        """The episodes of a block with their numbers in the source."""
        for reading in block:
            if isinstance(reading, Notice):
                self.warnings.append(str(reading))
                continue
            if isinstance(reading, UserError):
                self._drop(self._read, reading)
            else:
                self._same_kind(reading)
                yield self._read, reading
            self._read += 1

    def _same_kind(self, episode: Episode) -> None:
        has_log_prob = episode.log_prob is not None
        self._logged = has_log_prob if self._logged is None else self._logged
        if has_log_prob != self._logged:
            raise UserError(
                f"{self.source}, episode {self._read}: some episodes have log-probabilities: give all or none."
            )

    def _sound(self, numbered: list[tuple[int, Episode]]) -> tuple[list[int], list[np.ndarray], list[bool]]:
        """Numbers, packed rows and true ends of the episodes that pass: all at once, or one by one if that fails."""
        try:
            rows = [_pack(self.spec, episode) for _, episode in numbered]
            extra = np.cumsum([len(part) for part in rows]) - 1
            clean = not rows or is_clean(self.spec, np.concatenate(rows), extra)
        except (ValueError, TypeError):
            clean = False
        if not clean:
            numbered = [(number, episode) for number, episode in numbered if self._passes(number, episode)]
            rows = [_pack(self.spec, episode) for _, episode in numbered]
        return [number for number, _ in numbered], rows, [bool(episode.terminal) for _, episode in numbered]

    def _passes(self, number: int, episode: Episode) -> bool:
        try:
            check_episode(self.spec, episode, f"{self.source}, episode {number}")
        except UserError as error:
            self._drop(number, error)
            return False
        return True

    def _drop(self, number: int, error: UserError) -> None:
        if not self.repair:
            raise UserError(f"{error} Or leave damaged episodes out: repair=True, or `data convert NAME --repair`.")
        self._dropped[number] = str(error)


def _pack(spec: Spec, episode: Episode) -> np.ndarray:
    """The rows [T+1, W] of one episode; ValueError or TypeError where its shapes or types do not fit."""
    width, steps = spec.obs_width, len(episode.reward)
    rows = np.zeros((steps + 1, width + spec.action_width + 1 + (episode.log_prob is not None)), dtype=np.float32)
    parts = (episode.obs, episode.action, episode.reward, episode.log_prob)
    shapes = ((steps + 1, width), (steps, spec.action_width), (steps,), (steps,))
    if steps == 0 or any(not _fits(x, shape) for x, shape in zip(parts, shapes, strict=True) if x is not None):
        raise ValueError("shapes do not fit")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and that is found out
        rows[:, :width] = episode.obs
        rows[:-1, width : width + spec.action_width] = episode.action
        rows[:-1, width + spec.action_width] = episode.reward
        if episode.log_prob is not None:
            rows[:-1, -1] = episode.log_prob
    return rows


def _fits(x: np.ndarray, shape: tuple[int, ...]) -> bool:
    array = np.asarray(x)
    return array.shape == shape and array.dtype.kind in "biuf"
