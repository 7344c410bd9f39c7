"""What learned values say about the data: `python eval/advantages.py RUN [RUN ...]`, of runs of IQL or the KL actor.

Over 20,000 transitions of a run's dataset: how Q of the data's actions, V and the advantage Q - V go with the return of
the episode, and with what was earned from there on. An advantage that knows which actions were good goes with what was
earned less V. And how many times the weight of the worse half of the episodes the better half gets from IQL: in their
first step, in the twenty after it, and later. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_cai import commands, seeding
from offline_cai.algorithms.iql import IQL
from offline_cai.algorithms.kl_actor import KLActor
from offline_cai.data import catalogue
from offline_cai.data.trajectories import Trajectories
from offline_cai.data.windows import Windows

COUNT = 20_000


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


@torch.no_grad()
def facts(run: Path) -> dict[str, Any]:
    opened = commands.open_run(run)
    algorithm, data = opened.algorithm, catalogue.trajectories(opened.experiment.data)
    assert isinstance(algorithm, IQL | KLActor), "these have values of their own"
    windows = Windows(data, 1, 1, algorithm.config.discount, False)
    rows = windows.draw(np.random.default_rng(0), COUNT)
    batch = windows.gather(rows, seeding.keys(0, 0, torch.arange(COUNT)))
    episode = data.returns[np.searchsorted(data.offsets, rows, side="right") - 1]
    earned = batch.returns[:, 0].numpy()
    obs, action = algorithm.now(batch)
    critic = algorithm.target if isinstance(algorithm, IQL) else algorithm.critic
    q = algorithm.returns.decode(critic(obs, action).amin(0)).numpy()
    found = {"Q, episode": correlation(q, episode), "Q, earned": correlation(q, earned)}
    if isinstance(algorithm, IQL):
        v = algorithm.returns.decode(algorithm.value(obs)).numpy()
        found |= {"V, episode": correlation(v, episode), "A, episode": correlation(q - v, episode)}
        found |= {"A, earned - V": correlation(q - v, earned - v)}
        found |= {"deviation of A": float((q - v).std()), "deviation of earned - V": float((earned - v).std())}
        found |= preferences(algorithm, data)
    return found


@torch.no_grad()
def preferences(algorithm: IQL, data: Trajectories) -> dict[str, float]:
    """Weight of the better half of the episodes over that of the worse half, in parts of their time."""
    windows, found = Windows(data, 1, 1, algorithm.config.discount, False), {}
    episode = np.searchsorted(data.offsets, windows.starts, side="right") - 1
    time, better = windows.starts - data.offsets[episode], data.returns[episode] > np.median(data.returns)
    for name, low, high in (("first step", 0, 1), ("steps 1 to 20", 1, 21), ("later", 21, 1 << 40)):
        at = np.flatnonzero((time >= low) & (time < high))
        at = at[:: max(1, -(-len(at) // COUNT))]
        good = torch.from_numpy(better[at])
        if good.all() or not good.any():
            continue  # no episode is as long, or all are alike
        batch = windows.gather(windows.starts[at], seeding.keys(0, 0, torch.arange(len(at))))
        obs, action = algorithm.now(batch)
        weight = algorithm.projection.weights(algorithm.advantage(algorithm.least(obs, action) - algorithm.value(obs)))
        found[f"better / worse, {name}"] = float(weight[good].mean() / weight[~good].mean())
    return found


def main() -> None:
    torch.set_num_threads(1)
    found = {Path(name).name: facts(Path(name)) for name in sys.argv[1:]}
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in numbers.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
