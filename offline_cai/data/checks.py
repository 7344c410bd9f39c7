"""What an episode has to be. Whoever reads data, from anywhere, passes it through here."""

from collections.abc import Sequence

import numpy as np

from offline_cai.core import Discrete, Episode, Spec
from offline_cai.errors import UserError

SLACK = 1e-4  # float32 rounding of an action at its bound


def check_episode(spec: Spec, episode: Episode, where: str) -> None:
    """Raise a UserError that names the field, the row and the mend if the episode is damaged."""
    obs, action, reward = (np.asarray(x) for x in (episode.obs, episode.action, episode.reward))
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
    log_prob = np.zeros(1) if episode.log_prob is None else np.asarray(episode.log_prob)
    numbers = (("observations", obs), ("actions", action), ("rewards", reward), ("log-probabilities", log_prob))
    for name, array in numbers:
        bad = np.argwhere(~np.isfinite(np.asarray(array, dtype=np.float32)))
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


def first_damaged(spec: Spec, episodes: Sequence[Episode], where: str, first: int) -> None:
    """Raise for the first damaged one of `episodes`, which are numbered from `first`."""
    for number, episode in enumerate(episodes, start=first):
        check_episode(spec, episode, f"{where}, episode {number}")
