"""D4RL's reference returns: what 0 and 100 mean for each of its tasks.

The table is `d4rl/infos.py` of Farama-Foundation/D4RL (Apache-2.0) with its loops expanded; the file names the commit.
"""

import json
from functools import cache
from importlib.resources import files

import numpy as np

from offline_cai.errors import UserError, did_you_mean


@cache
def table() -> dict[str, tuple[float, float]]:
    groups = json.loads(files("offline_cai.data").joinpath("d4rl_scores.json").read_text())["table"]
    return {name: (ref["ref_min"], ref["ref_max"]) for group in groups.values() for name, ref in group.items()}


def reference(task: str) -> tuple[float, float]:
    """The returns that score 0 and 100 on a D4RL task such as "maze2d-umaze-v1".

    Raises:
        UserError: D4RL has no reference for a task of that name.
    """
    if task not in table():
        raise UserError(f"D4RL has no reference returns for {task!r}; {did_you_mean(task, table())}")
    return table()[task]


def normalised(returns: np.ndarray, low: float, high: float) -> np.ndarray:
    """100 (return - low) / (high - low); Minari's own function gives a hundredth of it."""
    return 100 * (np.asarray(returns, dtype=float) - low) / (high - low)
