"""How well a learned return ranks plans, on episodes that it was not trained on: `check_ranker.py RUN DATASET`.

A value may know well which states are good and yet not which plan from a state is the better one, and a ranker of plans
needs the second. So two correlations, over windows of the dataset: of the value of a window with its return-to-go, and
of what the window adds to the value of its first state with what that state leaves open of the return. The value of a
state is the one of windows that are noise besides (the highest level). Standard errors are over resampled episodes.

    offline-cai train guide-planner-hopper-medium --output runs/guide
    offline-cai collect hopper-medium --id offline-cai/hopper/medium-held-out-v0 --seed 1 --steps 40000
    python eval/check_ranker.py runs/guide offline-cai/hopper/medium-held-out-v0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from offline_cai import seeding
from offline_cai.algorithms.guide import Guide
from offline_cai.commands import open_run
from offline_cai.core import Known
from offline_cai.data import catalogue
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows

WINDOWS, NOISES, RESAMPLES = 4096, 8, 200


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, help="a trained run of the algorithm guide, model.kind: value")
    parser.add_argument("dataset", help="a dataset of the same behaviour that it was not trained on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    guide = open_run(arguments.run).algorithm
    assert isinstance(guide, Guide)
    print(json.dumps(check(guide, catalogue.trajectories(arguments.dataset))))


@torch.no_grad()
def check(guide: Guide, store: Trajectories) -> dict[str, float]:
    """Correlations with standard errors, and the share of the return's variance that first states leave open."""
    needs = guide.needs
    windows = Windows(store, needs.horizon, needs.stride, needs.discount, padding=False)
    items = windows.draw(seeding.rng(0), WINDOWS)
    batch = windows.gather(items, seeding.keys(0, 0, torch.arange(WINDOWS)))
    x, diffuser = guide.diffuser.codec.encode(batch), guide.diffuser
    known = Known(x, diffuser.mask(x))
    of_window = guide.log_evidence(x, torch.zeros(WINDOWS).long(), 1.0)
    top = torch.full((WINDOWS,), diffuser.config.levels - 1)
    noises = (seeding.normal(batch.key, tuple(x.shape[1:]), stream=n) for n in range(NOISES))
    of_state = torch.stack([guide.log_evidence(known.impose(noise), top, 1.0) for noise in noises]).mean(0)
    numbers = np.stack([part.double().numpy() for part in (batch.returns[:, 0], of_window, of_state)])
    episode = np.searchsorted(store.offsets, items, side="right") - 1
    rng = np.random.default_rng(0)
    resampled = np.array([_correlations(numbers[:, _resample(episode, rng)]) for _ in range(RESAMPLES)])
    names = ("value_with_return", "added_with_left_open", "share_left_open")
    means, errors = _correlations(numbers), resampled.std(0, ddof=1)
    return (
        {name: float(m) for name, m in zip(names, means, strict=True)}
        | {f"{name}_se": float(e) for name, e in zip(names, errors, strict=True)}
        | {"windows": WINDOWS, "episodes": len(np.unique(episode))}
    )


def _correlations(numbers: np.ndarray) -> tuple[float, float, float]:
    returns, of_window, of_state = numbers
    added, open_ = of_window - of_state, returns - of_state
    of_value, of_added = (float(np.corrcoef(*pair)[0, 1]) for pair in ((of_window, returns), (added, open_)))
    return of_value, of_added, float(open_.var() / returns.var())


def _resample(episode: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Windows of as many episodes, drawn with replacement."""
    numbers, which = np.unique(episode, return_inverse=True)
    times = np.bincount(rng.integers(len(numbers), size=len(numbers)), minlength=len(numbers))
    return np.repeat(np.arange(len(episode)), times[which])


if __name__ == "__main__":
    main()
