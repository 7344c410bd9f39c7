"""What is inside a store, as numbers, as a table for people, and as a picture."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from offline_cai.core import Spec
from offline_cai.data.trajectories import Trajectories

CELLS = 32  # a side of the grid that coverage counts


def describe(data: Trajectories) -> dict[str, Any]:
    """Episodes, steps, lengths, returns, ends by kind, duplicates, coverage, ranges by field; plain data for JSON."""
    lengths, returns, spec = data.lengths, data.returns, data.spec
    low, high = np.array(spec.action.low), np.array(spec.action.high)
    ranges, at_bound = _Ranges(), np.zeros(spec.action_width)
    for obs, action, _ in data.chunks():
        ranges.add(np.concatenate([obs, action], axis=1))
        at_bound += ((action <= low + 1e-6) | (action >= high - 1e-6)).sum(0)
    fields = {}
    for field in spec.obs:
        columns = spec.columns(field.name)
        fields[field.name] = {"low": ranges.low[columns].tolist(), "high": ranges.high[columns].tolist()}
    actions = slice(spec.obs_width, None)
    return {
        **data.info,
        "episodes": data.num_episodes,
        "steps": data.num_steps,
        "length": _spread(lengths),
        "return": _spread(returns),
        "ends": {"true end": int(data.terminal.sum()), "cut by time": int((~data.terminal).sum())},
        "duplicated episodes": duplicates(data),
        "coverage": coverage(data, ranges.low, ranges.high),
        "seconds per step": spec.dt,
        "observation": fields,
        "action": {"low": ranges.low[actions].tolist(), "high": ranges.high[actions].tolist()},
        "share of actions at a bound": (at_bound / data.num_steps).tolist(),
        "log-probabilities": data.log_prob is not None,
    }


def duplicates(data: Trajectories) -> int:
    """Number of episodes that are, byte for byte, another episode of the store again."""
    digests = Counter(
        hashlib.sha256(data.rows[start:stop].tobytes()).digest()
        for start, stop in zip(data.offsets[:-1], data.offsets[1:], strict=True)
    )
    return sum(count - 1 for count in digests.values())


def coverage(data: Trajectories, low: np.ndarray, high: np.ndarray) -> dict[str, Any]:
    """Share of the cells of a grid over the observation's first two columns, from `low` to `high`, that hold a step."""
    columns = list(range(min(2, data.spec.obs_width)))
    low, span = low[columns], np.maximum(high - low, np.finfo(np.float32).tiny)[columns]
    seen = np.zeros((CELLS,) * len(columns), dtype=bool)
    for obs, *_ in data.chunks():
        cells = np.minimum((obs[:, columns] - low) / span * CELLS, CELLS - 1).astype(int)
        seen[tuple(cells.T)] = True
    names = column_names(data.spec)[: len(columns)]
    return {"share": float(seen.mean()), "of cells": " x ".join([str(CELLS)] * len(columns)), "over": names}


def column_names(spec: Spec) -> list[str]:
    """A name for each column of an observation."""
    return [f"{field.name}[{i}]" if field.width > 1 else field.name for field in spec.obs for i in range(field.width)]


def table(facts: dict[str, Any]) -> str:
    """The facts of `describe`, a line each."""
    lines = []
    for name, value in facts.items():
        if name == "observation":
            lines += [f"{f'  {field}':28} {_range(r)}" for field, r in value.items()]
        elif name in ("warnings", "dropped"):
            lines += [f"{name:28} {sentence}" for sentence in value or ["none"]]
        elif name == "action":
            lines.append(f"{'  action':28} {_range(value)}")
        else:
            lines.append(f"{name:28} {_text(value)}")
    return "\n".join(lines)


def picture(data: Trajectories, path: Path) -> None:
    """Histograms of returns and lengths, and where the first two columns of the observation have been."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    returns, lengths, where = figure.subplots(1, 3)
    for axes, values, name in ((returns, data.returns, "return"), (lengths, data.lengths, "length in steps")):
        axes.hist(values, bins=40, color="#c2410c")
        axes.set(xlabel=name, ylabel="episodes")
    rows = data.rows[:: max(1, len(data.rows) // 20_000)]
    names, second = column_names(data.spec), min(1, data.spec.obs_width - 1)
    where.plot(rows[:, 0], rows[:, second], ".", markersize=1, color="#1f2430", alpha=0.3)
    where.set(xlabel=names[0], ylabel=names[second])
    for axes in (returns, lengths, where):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


class _Ranges:
    """Running lowest and highest value of each column."""

    def __init__(self) -> None:
        self.low, self.high = np.array([np.inf]), np.array([-np.inf])

    def add(self, part: np.ndarray) -> None:
        self.low, self.high = np.minimum(self.low, part.min(0)), np.maximum(self.high, part.max(0))


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "lowest": float(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "highest": float(values.max()),
    }


def _range(bounds: dict[str, list[float]]) -> str:
    return "  ".join(f"[{low:.3g}, {high:.3g}]" for low, high in zip(bounds["low"], bounds["high"], strict=True))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return " · ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return " ".join(_text(inner) for inner in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
