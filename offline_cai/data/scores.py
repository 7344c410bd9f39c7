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


OTHERS = {
    "Walker2d-v5": "Walker2d-v5 is another task than the Walker2d-v2 of D4RL's references (its right foot has a "
    "friction of 1.9, not 0.9): its scores compare with each other only; Walker2d-v4 has the old model.",
    "Ant-v5": "Ant-v5 is another task than the Ant-v2 of D4RL's references (it observes contact forces, which cost "
    "reward): its scores compare with each other only.",
}
"""Environments that D4RL's references do not belong to, although the names are alike: by Gymnasium's version notes."""


def mismatch(score: object, environment: str) -> str | None:
    """In words, if a score is by a D4RL task whose references were measured in another task than this environment."""
    same_name = isinstance(score, str) and score.split("-")[0] == environment.split("-")[0].lower()
    return OTHERS.get(environment) if same_name else None


def normalised(returns: np.ndarray, low: float, high: float) -> np.ndarray:
    """100 (return - low) / (high - low); Minari's own function gives a hundredth of it."""
    return 100 * (np.asarray(returns, dtype=float) - low) / (high - low)
