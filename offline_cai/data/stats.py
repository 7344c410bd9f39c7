"""What normalisers see of a store: mean, spread, range and quantiles of every column, of returns and of scores."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from offline_cai.data import scores
from offline_cai.data.codec import SAMPLE, Moments, Sample
from offline_cai.data.describe import column_names
from offline_cai.data.trajectories import Trajectories

QUANTILES = (1, 25, 50, 75, 99)  # per cent
_PART = 1 << 17  # rows at a time


def stats(store: Trajectories, reference: tuple[float, float] | None = None) -> dict[str, Any]:
    """Numbers of each column of an observation and an action, of rewards, and of episodes; plain data for JSON.

    The quantiles of columns are those of at most SAMPLE steps, evenly spread over the data; all else is exact.

    Args:
        reference: the returns that score 0 and 100; None: there is none, and no score is made up.
    """
    moments, sample = Moments(), Sample()
    for part in _steps(store):
        moments.add(part.astype(np.float64))
        sample.add(part)
    actions = [f"action[{column}]" for column in range(store.spec.action_width)]
    mean, std = moments.gaussian()
    columns = zip(mean, std, moments.low, moments.high, _quantiles(sample.rows()), strict=True)
    names = [*column_names(store.spec), *actions, "reward"]
    per_episode = {"return": store.returns, "length": store.lengths}
    if reference is not None:
        per_episode["score"] = scores.normalised(store.returns, *reference)
    return {
        "columns": {name: _row(*numbers) for name, numbers in zip(names, columns, strict=True)},
        "episodes": {name: _spread(values) for name, values in per_episode.items()},
        "reference": None if reference is None else list(reference),
        "quantiles of columns from": f"{min(len(sample.rows()), SAMPLE)} of {store.num_steps} steps",
    }


def text(facts: dict[str, Any]) -> str:
    """The tables of `stats`."""
    heads = ["mean", "std", "lowest", *(f"{q}%" for q in QUANTILES), "highest"]
    rows = {**facts["columns"], **{f"{name} of an episode": row for name, row in facts["episodes"].items()}}
    width = max(map(len, rows)) + 2
    lines = [" " * width + "".join(f"{head:>11}" for head in heads)]
    lines += [f"{name:{width}}" + "".join(f"{row[head]:>11.4g}" for head in heads) for name, row in rows.items()]
    if facts["reference"] is None:
        lines.append("no score: the dataset names no reference returns, and none is made up.")
    else:
        low, high = facts["reference"]
        lines.append(
            f"score: 0 and 100 (Minari says 0 and 1) are returns of {low:g} and {high:g} in the evaluation environment."
        )
    return "\n".join([*lines, f"quantiles of columns are of {facts['quantiles of columns from']}."])


def _steps(store: Trajectories) -> Iterator[np.ndarray]:
    """Observation, action and reward [m, O+A+1] of all steps, a bounded part at a time."""
    width = store.spec.obs_width + store.spec.action_width + 1
    for start in range(0, len(store.rows), _PART):
        part = slice(start, start + _PART)
        keep = store.end[part] > np.arange(start, start + len(store.end[part]))
        yield store.rows[part, :width][keep]


def _quantiles(rows: np.ndarray) -> np.ndarray:
    return np.quantile(rows.astype(np.float64), np.array(QUANTILES) / 100, axis=0).T


def _spread(values: np.ndarray) -> dict[str, float]:
    return _row(values.mean(), values.std(), values.min(), values.max(), _quantiles(values[:, None])[0])


def _row(mean: float, std: float, low: float, high: float, quantiles: np.ndarray) -> dict[str, float]:
    named = {f"{q}%": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": float(mean), "std": float(std), "lowest": float(low), **named, "highest": float(high)}
