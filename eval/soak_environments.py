"""Environments that raise, are killed, hang or return NaN: `python eval/soak_environments.py`.

Each fault strikes a random environment at a random step. It counts as found if the error names the environment, its
worker, its seed and the step within the timeout. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np

from offline_cai.environments.make import make
from offline_cai.environments.vector import EnvironmentFault, Environments

FAULTS = {"raise": "raised", "kill": "died", "hang": "hung", "nan": "not finite"}
COUNT, WORKERS, TIMEOUT = 4, 2, 1.0


class Faulty(gym.Wrapper):
    """Fails in one way at one step of the episode with one seed."""

    def __init__(self, env: gym.Env, fault: str, seed: int, step: int) -> None:
        super().__init__(env)
        self.fault, self.when, self.now = fault, (seed, step), (-1, 0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.now = (seed, 0)
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> Any:
        self.now = (self.now[0], self.now[1] + 1)
        obs, *rest = self.env.step(action)
        if self.now != self.when:
            return obs, *rest
        if self.fault == "raise":
            raise RuntimeError("the simulation is unstable")
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "hang":
            time.sleep(3600)
        return np.full_like(obs, np.nan), *rest


def faulty(fault: str, seed: int, step: int) -> gym.Env:
    """A pendulum with a fault."""
    return Faulty(make("Pendulum-v1"), fault, seed, step)


def provoke(fault: str, environment: int, step: int) -> tuple[EnvironmentFault | None, float]:
    """What comes of stepping to a fault, and the seconds that the last step took."""
    seeds = list(range(100, 100 + COUNT))
    envs = Environments(functools.partial(faulty, fault, seeds[environment], step), COUNT, WORKERS, TIMEOUT)
    began = time.monotonic()
    try:
        envs.reset(seeds)
        for _ in range(step):
            began = time.monotonic()
            envs.step(np.zeros((COUNT, 1), dtype=np.float32))
    except EnvironmentFault as error:
        return error, time.monotonic() - began
    finally:
        envs.close()
    return None, 0.0


def named(error: EnvironmentFault | None, fault: str, environment: int, step: int) -> bool:
    """Whether the error says what happened, where, and in which episode."""
    worker, seed = environment * WORKERS // COUNT, 100 + environment
    words = (f"environment {environment} ", f"worker {worker} ", f"step {step} ", f"seed {seed}.")
    return error is not None and error.fault == FAULTS[fault] and all(word in str(error) for word in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=52)
    count, rng = parser.parse_args().faults, np.random.default_rng(0)
    found, seconds = dict.fromkeys(FAULTS, 0), dict.fromkeys(FAULTS, 0.0)
    tried = dict.fromkeys(FAULTS, 0)
    for number in range(count):
        fault = list(FAULTS)[number % len(FAULTS)]
        environment, step = int(rng.integers(COUNT)), int(rng.integers(1, 150))
        error, took = provoke(fault, environment, step)
        tried[fault] += 1
        found[fault] += named(error, fault, environment, step)
        seconds[fault] = max(seconds[fault], took)
        if number < len(FAULTS):
            print(error)
    print(f"\n{'fault':<8}{'tried':>8}{'found':>8}{'slowest, s':>12}")
    for fault in FAULTS:
        print(f"{fault:<8}{tried[fault]:>8}{found[fault]:>8}{seconds[fault]:>12.2f}")
    result = {"tried": tried, "found": found, "slowest_seconds": seconds, "timeout_seconds": TIMEOUT}
    print(json.dumps({"command": "python " + " ".join(sys.argv), **result}))
    sys.exit(found != tried)


if __name__ == "__main__":
    main()
