"""How long a guided plan of hopper takes: ours, and the original recipe's at its own sizes.

Both draw 64 plans of one state and choose one by the learned return. The original's are steered by its gradient at each
level as well; ours are short and learned from the posterior over whole episodes, so that ranking is all that is left.
The weights are untrained: what they are does not change the time. `python eval/guided_latency.py` prints one JSON
object; `bench_planning.py` asks for it as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from offline_cai import config
from offline_cai.algorithms.diffuser import DiffuserConfig
from offline_cai.algorithms.guide import Guide, GuideConfig
from offline_cai.core import Box, Field, Spec
from offline_cai.planning.config import PlannerConfig

SAMPLES = 64
HOPPER = Spec((Field("observation", 11),), Box((-1.0,) * 3, (1.0,) * 3), dt=0.008)

ORIGINAL = DiffuserConfig(
    rows=32,
    stride=1,
    goal_field=None,
    actions=True,
    normaliser="gaussian",
    multipliers=(1, 2, 4, 8),
    levels=20,
    planner=PlannerConfig(
        sampler="ddpm",
        steps=20,
        guide="at_noisy",
        guide_repeats=2,
        guide_lowest=2,
        candidates=SAMPLES,
        execute="actions",
    ),
)
"""Janner et al. 2022, hopper: 3,956,302 weights that denoise and 2,294,817 that value (their released code)."""


def guided_latency(rounds: int) -> dict[str, float]:
    """Medians over `rounds` of CPU milliseconds for a plan, both recipes in turn."""
    recipe = config.find("planner-hopper-medium", "configs")
    own = config.build(DiffuserConfig, config.read(recipe)["model"], str(recipe))
    own = replace(own, planner=replace(own.planner, candidates=SAMPLES, noise=1.0))
    ours = _planning(Guide(HOPPER, GuideConfig(kind="evidence", diffuser=own)))
    theirs = _planning(Guide(HOPPER, GuideConfig(kind="value", diffuser=ORIGINAL, multipliers=(1, 2, 4, 8))))
    pairs = [(_milliseconds(ours), _milliseconds(theirs)) for _ in range(rounds + 1)][1:]
    fast, slow = (median(side) for side in zip(*pairs, strict=True))
    return {"guided_plan_ms": fast, "original_guided_plan_ms": slow, "guided_latency_ratio": slow / fast}


def _planning(guide: Guide) -> Callable[[], object]:
    diffuser, obs, key = guide.guided(), np.zeros((1, HOPPER.obs_width)), torch.tensor([1])
    return lambda: diffuser.plan(obs, key)


def _milliseconds(plan: Callable[[], object]) -> float:
    began = time.process_time()
    plan()
    return 1000 * (time.process_time() - began)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(guided_latency(rounds=5)))
