"""How fast actor-critics are updated: `python eval/bench_updates.py [--keep FILE] [--rounds N]`.

It needs the extra `bench`.

Updates of SAC and IQL as `offline-cai train` makes them (a batch from the source, `TrainingState.iterate`, its row of
numbers), next to `train()` of Stable-Baselines3's SAC with its defaults: batches of 256 out of the same 200,000 random
transitions of Hopper's sizes, two hidden layers of 256, one thread. The floor is the matrix products of a SAC update
by themselves. Prints medians of CPU time and, as its last line, one JSON object: medians over rounds, in which all take
turns, of Stable-Baselines3's CPU time over ours. It has no IQL, so that is compared with its SAC.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import torch
from accelerate import Accelerator
from stable_baselines3 import SAC as PeerSAC
from stable_baselines3.common.logger import Logger

from offline_cai.core import Episode
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.make import env_spec
from offline_cai.provenance import versions
from offline_cai.training import experiment, loop, sources
from offline_cai.training.online import Simulation
from offline_cai.training.state import TrainingState

STEPS, LENGTH, BATCH, UPDATES = 200_000, 250, 256, 20
Update = Callable[[], object]
ENVIRONMENT = {"environment.random_steps": "1", "environment.updates": str(1 << 40)}  # no step between the updates


def episodes(simulation: Simulation) -> list[Episode]:
    """Random numbers of the environment's sizes; every other episode ends truly."""
    env, rng = simulation.make(), np.random.default_rng(0)
    spec = env_spec(env)
    env.close()
    return [
        Episode(
            rng.normal(size=(LENGTH + 1, spec.obs_width)),
            rng.uniform(spec.box.low, spec.box.high, size=(LENGTH, spec.action_width)),
            rng.normal(size=LENGTH),
            bool(i % 2),
        )
        for i in range(STEPS // LENGTH)
    ]


def ours(name: str, flags: dict[str, str], data: Trajectories, folder: Path) -> Update:
    """The update of a config, with its own source."""
    config = experiment.load(name, {"training.batch_size": str(BATCH), **flags})
    algorithm, accelerator = loop.build(config, data), Accelerator(cpu=True)
    source = sources.build(config, algorithm, data, accelerator, folder)
    state, step = TrainingState(algorithm, config.training, accelerator), 0

    def update() -> None:
        nonlocal step
        state.iterate(step, source(step))
        step += 1

    return update


def peer(simulation: Simulation, episodes: list[Episode]) -> Update:
    """`train()` of Stable-Baselines3's SAC, with its default settings."""
    model = PeerSAC("MlpPolicy", simulation.make(), batch_size=BATCH, buffer_size=STEPS, device="cpu", seed=0)
    model._logger = Logger(None, [])
    for e in episodes:
        for t in range(LENGTH):
            done = e.terminal and t == LENGTH - 1
            model.replay_buffer.add(e.obs[t], e.obs[t + 1], e.action[t], e.reward[t], np.array([done]), [{}])
    return lambda: model.train(gradient_steps=1, batch_size=BATCH)


class Products:
    """The matrix products of one network: forward, and backward to its weights, its inputs, or both."""

    def __init__(self, *widths: int) -> None:
        self.weights = [torch.randn(a, b) * a**-0.5 for a, b in pairwise(widths)]
        self.x = [torch.randn(BATCH, width) for width in widths]
        self.back = [torch.randn(BATCH, width) for width in widths]
        self.gradient = [torch.empty_like(weight) for weight in self.weights]

    def forward(self) -> None:
        for weight, (x, y) in zip(self.weights, pairwise(self.x), strict=True):
            torch.mm(x, weight, out=y)

    def backward(self, weights: bool, inputs: bool) -> None:
        for i in reversed(range(len(self.weights))):
            if weights:
                torch.mm(self.x[i].T, self.back[i + 1], out=self.gradient[i])
            if i or inputs:
                torch.mm(self.back[i + 1], self.weights[i].T, out=self.back[i])


def floor(obs: int, action: int) -> Update:
    """The products of a SAC update: nothing can be left out of them."""
    actor, critics = Products(obs, 256, 256, 2 * action), [Products(obs + action, 256, 256, 1) for _ in range(2)]

    def update() -> None:
        actor.forward()  # at the next state
        for critic in critics:
            critic.forward()  # the target there
            critic.forward()
            critic.backward(weights=True, inputs=False)
        actor.forward()
        for critic in critics:
            critic.forward()
            critic.backward(weights=False, inputs=True)
        actor.backward(weights=True, inputs=False)

    return update


def take_turns(sides: dict[str, Update], rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds of an update of each side, for each round; the first one only warms up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, update in sides.items():
            began = time.process_time()
            for _ in range(UPDATES):
                update()
            times[name].append(1000 * (time.process_time() - began) / UPDATES)
    return {name: rounds[1:] for name, rounds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, help="write the result, with what lies behind it, to a file")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    simulation = experiment.load("sac-hopper").environment
    assert simulation is not None
    random = episodes(simulation)
    env = simulation.make()
    data = Trajectories.from_episodes(env_spec(env), random)
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            "sb3": peer(simulation, random),
            "sac": ours("sac-hopper", ENVIRONMENT, data, Path(folder)),
            "iql": ours("iql-hopper-medium", {}, data, Path(folder)),
            "floor": floor(data.spec.obs_width, data.spec.action_width),
        }
        times = take_turns(sides, arguments.rounds)
    for name, rounds in times.items():
        print(f"{name:<8}{median(rounds):>8.2f} ms of CPU per update")
    ratios = {
        f"{name}_vs_sb3": round(median(s / t for s, t in zip(times["sb3"], times[name], strict=True)), 3)
        for name in ("sac", "iql", "floor")
    }
    if arguments.keep:
        about = {
            "command": "make bench-updates",
            "date": str(date.today()),
            "versions": {**versions(), "stable-baselines3": version("stable-baselines3")},
        }
        arguments.keep.write_text(json.dumps({**about, "load": load, "result": ratios, "ms": times}, indent=1) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
