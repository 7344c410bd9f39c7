"""What an episode has to be, and what is odd in many. Whoever reads data, from anywhere, passes it through here."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from offline_cai.core import Discrete, Episode, Spec
from offline_cai.errors import UserError

SLACK = 1e-4  # float32 rounding of an action at its bound


def check_episode(spec: Spec, episode: Episode, where: str) -> None:
    """Raise a UserError that names the field, the row and the mend if the episode is damaged."""
    parts = {"observations": episode.obs, "actions": episode.action, "rewards": episode.reward}
    if episode.log_prob is not None:
        parts["log-probabilities"] = episode.log_prob
    arrays = {name: _numbers(name, part, where) for name, part in parts.items()}
    obs, action, reward = (arrays[name] for name in ("observations", "actions", "rewards"))
    if reward.ndim != 1:
        raise UserError(f"{where}: rewards have shape {reward.shape}, not [steps]. Sum what belongs to one step.")
    steps = len(reward)
    if steps == 0:
        raise UserError(f"{where}: no steps. Drop it.")
    widths = {"observations": (obs, steps + 1, spec.obs_width), "actions": (action, steps, spec.action_width)}
    for name, (array, rows, width) in widths.items():
        if array.ndim != 2 or array.shape[1] != width:
            raise UserError(f"{where}: {name} have shape {array.shape}, but the spec says width {width}.")
        if len(array) != rows:
            raise UserError(
                f"{where}: {len(array)} {name} for {steps} rewards; there should be {rows}. Drop or repair it."
            )
    if episode.log_prob is not None and np.shape(episode.log_prob) != (steps,):
        raise UserError(f"{where}: log-probabilities have shape {np.shape(episode.log_prob)}, not ({steps},).")
    for name, array in arrays.items():
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(array.astype(np.float32)))
        if len(bad):
            raise UserError(
                f"{where}: {name} hold {array[tuple(bad[0])]} at row {bad[0][0]} ({len(bad)} such numbers in all; a "
                "number beyond float32 counts). Drop the episode, or collect or download the dataset again."
            )
    low, high = np.array(spec.action.low), np.array(spec.action.high)
    outside = np.argwhere((action < low - SLACK) | (action > high + SLACK))
    if len(outside):
        row, column = outside[0]
        raise UserError(
            f"{where}: action {action[row, column]:.4g} at row {row}, component {column} is outside the bounds "
            f"[{low[column]:.4g}, {high[column]:.4g}]. Clip the actions as the environment did, or mend the bounds."
        )
    between = np.argwhere(action != np.rint(action))
    if isinstance(spec.action, Discrete) and len(between):
        row, column = between[0]
        raise UserError(
            f"{where}: action {action[row, column]:.4g} at row {row}, component {column} is no whole number, but the "
            "actions are choices. Declare them as continuous, or store the choice."
        )


def _numbers(name: str, part: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(part)
    except ValueError:
        raise UserError(f"{where}: {name} have rows of different lengths. Drop or repair it.") from None
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where}: {name} hold {array.dtype}, not numbers. Convert them.")
    return array


def is_clean(spec: Spec, rows: np.ndarray, extra: np.ndarray) -> bool:
    """Whether packed rows [N, W] of many episodes are finite and their actions within bounds: one quick pass.

    `extra` are the numbers of the extra rows, which hold no action.
    """
    action = rows[:, spec.obs_width : spec.obs_width + spec.action_width]
    low, high = (np.array(bound, dtype=np.float32) for bound in (spec.action.low, spec.action.high))
    good = (action >= low - SLACK) & (action <= high + SLACK)
    if isinstance(spec.action, Discrete):
        good &= action == np.rint(action)
    good[extra] = True
    return bool(good.all() and np.isfinite(rows).all())


# What is odd ----------------------------------------------------------------------------------------------------------


def oddities(numbers: np.ndarray, lengths: np.ndarray, terminal: np.ndarray, prints: np.ndarray) -> list[str]:
    """What is odd in E sound episodes, a sentence each: repeated ones, and a time limit that looks like true ends.

    Args:
        numbers: of the episodes in their source [E].
        lengths: steps [E].
        terminal: true ends [E] bool.
        prints: equal for equal episodes [E].
    """
    found = []
    _, first, inverse = np.unique(prints, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(prints)))
    if len(again):
        found.append(
            f"{len(again)} of {len(prints)} episodes repeat another one number by number; the first is episode "
            f"{numbers[again[0]]}, which is episode {numbers[first[inverse[again[0]]]]} again. They weigh double."
        )
    longest = lengths == lengths.max()
    if longest.sum() >= max(2, len(lengths) / 10) and terminal[longest].all():
        found.append(
            f"{longest.sum()} of {len(lengths)} episodes truly end after exactly {lengths.max()} steps, and none is "
            "longer: that looks like a time limit, flagged as true ends. If it is one, flag these ends as cut "
            "(truncations, time-outs), since nothing is learned from beyond a true end."
        )
    return found


def some(noun: str, numbers: Sequence[int]) -> str:
    """Numbered things in a few words: "episodes 3, 7, 9 and 12 more"."""
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:3]))}{more}"


def both_flags(both: int, terminals: int, cuts: int) -> list[str]:
    """The sentence about end flags that are copies of each other: `both` of so many ends carry the two."""
    if both < 2 or not both == terminals == cuts:
        return []
    return [
        f"all {both} ends are flagged as true ends and as cut by time: one flag looks like a copy of the other. They "
        "are taken as true ends; if they are not, clear that flag."
    ]
