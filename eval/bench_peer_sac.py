"""SAC of Stable-Baselines3, with its defaults, on the steps and the starts of our scoreboard: `bench_peer_sac.py`.

It needs the extra `bench`. `bench_peer_sac.py hopper/0` makes that run alone. Each is trained as long as ours in
`eval/scoreboards/online.yaml`, and its mode is evaluated by the same protocol; what is done is kept in
`eval/results/peer-sac.json`, and not done again. The last line is one JSON object.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC

from offline_cai.environments.make import env_spec
from offline_cai.evaluation.evaluate import evaluate, protocol
from offline_cai.provenance import versions
from offline_cai.training import experiment

KEPT = Path(__file__).parent / "results" / "peer-sac.json"
RUNS = ("pendulum/0", "pendulum/1", "pendulum/2", "hopper/0")


class Mode:
    """Its deterministic policy, as one of ours."""

    def __init__(self, model: SAC) -> None:
        self._model = model

    def reset(self, done: np.ndarray | None = None) -> None:
        pass

    def act(self, obs: np.ndarray) -> tuple[np.ndarray, None]:
        return self._model.predict(obs.astype(np.float32), deterministic=True)[0], None


def run(name: str) -> dict[str, float]:
    task, seed = name.split("/")
    ours = experiment.load(f"sac-{task}")
    assert ours.environment is not None and ours.protocol is not None
    began = time.process_time()
    model = SAC("MlpPolicy", gym.make(ours.environment.id), seed=int(seed), device="cpu")
    steps = ours.training.steps + ours.environment.random_steps
    model.learn(total_timesteps=steps)
    minutes = (time.process_time() - began) / 60
    rules = protocol(ours.protocol, {"episodes": "20", "references": "[]"})
    with rules.make() as env:
        spec = env_spec(env)
    result = evaluate(rules, {"mode": lambda: Mode(model)}, spec, quiet=True)["mode"].summary
    return {"steps": steps, "mean": result.mean, "se": result.se, "episodes": result.n, "cpu_minutes": minutes}


def main() -> None:
    torch.set_num_threads(1)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"command": "make bench-peer-sac", "result": {}}
    for name in sys.argv[1:] or RUNS:
        if name not in kept["result"]:
            kept["result"][name] = run(name)
            kept["versions"] = {**versions(), "stable-baselines3": version("stable-baselines3")}
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        print(name, kept["result"][name], flush=True)
    print(json.dumps(kept["result"]))


if __name__ == "__main__":
    main()
