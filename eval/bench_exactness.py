"""How the exact core scales, how exact it is, and how near guided sampling comes to it: `make bench-exactness`.

Prints tables for people and, as its last line, one JSON object; the second half is `bench_guidance.py`. Cost: seconds
of one solve against the horizon, and the ratio of neighbouring horizons (10 is linear). Exactness: relative errors
against an independent computation.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable

import bench_guidance
import numpy as np
import torch

from offline_cai.inference import tabular
from offline_cai.inference.gaussian import LinearGaussian, QuadraticReward

HORIZONS = (100, 1_000, 10_000)


def chain(horizon: int, states: int = 20, actions: int = 4) -> tabular.MDP:
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(states, 0.5), (states, actions))
    return tabular.MDP(transition, rng.normal(size=(horizon, states, actions)), np.full(states, 1 / states))


def regulator(horizon: int) -> tuple[LinearGaussian, QuadraticReward]:
    rng = np.random.default_rng(0)
    A, B = 0.9 * np.eye(4) + 0.1 * rng.normal(size=(4, 4)), rng.normal(size=(4, 2))
    law = LinearGaussian(
        A,
        B,
        horizon=horizon,
        initial_mean=np.ones(4),
        initial_covariance=np.eye(4),
        action_covariance=np.eye(2),
        noise_covariance=0.1 * np.eye(4),
    )
    return law, QuadraticReward(torch.eye(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))


def seconds(work: Callable[[], object], repeats: int) -> float:
    """CPU seconds of the fastest of a few runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def costs() -> dict[str, list[float]]:
    table: dict[str, list[float]] = {"tabular variational": [], "tabular posterior": [], "gaussian posterior": []}
    for horizon in HORIZONS:
        repeats = 5 if horizon <= 1000 else 2
        mdp, (law, reward) = chain(horizon), regulator(horizon)
        table["tabular variational"].append(seconds(lambda m=mdp: tabular.solve(m), repeats))
        table["tabular posterior"].append(seconds(lambda m=mdp: tabular.solve(m, backup="posterior"), repeats))
        table["gaussian posterior"].append(seconds(lambda p=law, r=reward: p.posterior(r).mean, repeats))
    return table


def evidence_error(horizon: int) -> float:
    """|log p(O) - ELBO - KL| / |log p(O)| for the variational policy."""
    mdp = chain(horizon)
    policy = tabular.solve(mdp).policy
    log_evidence = tabular.solve(mdp, backup="posterior").log_evidence
    return abs(log_evidence - tabular.elbo(mdp, policy) - tabular.kl_to_posterior(mdp, policy)) / abs(log_evidence)


def gaussian_error(horizon: int) -> dict[str, float]:
    """Message passing against one dense Gaussian update of the whole trajectory, relative to the largest entry."""
    law, reward = regulator(horizon)
    posterior = law.posterior(reward)
    weight, linear, _ = reward.over(law.horizon, law.dim)
    mean, prior = law.mean.flatten(), law.covariance
    S, s = torch.block_diag(*weight), linear.flatten() - torch.block_diag(*weight) @ mean
    gain = torch.eye(len(mean), dtype=torch.float64) + prior @ S
    covariance = torch.linalg.solve(gain, prior)
    shift = covariance @ s
    log_z = -0.5 * mean @ S @ mean + linear.flatten() @ mean + 0.5 * s @ shift - 0.5 * torch.linalg.slogdet(gain)[1]

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().max() / b.abs().max())

    return {
        "gaussian mean": relative(posterior.mean.flatten(), mean + shift),
        "gaussian covariance": relative(posterior.covariance, covariance),
        "gaussian log evidence": relative(posterior.log_evidence, log_z),
    }


def main() -> None:
    torch.set_num_threads(1)
    table = costs()
    print(f"{'CPU seconds by horizon':<24}" + "".join(f"{h:>10}" for h in HORIZONS) + f"{'ratios':>16}")
    ratios = {}
    for name, row in table.items():
        ratios[name] = [later / earlier for earlier, later in itertools.pairwise(row)]
        cells = "".join(f"{x:>10.4f}" for x in row)
        print(f"{name:<24}{cells}" + "".join(f"{x:>8.1f}" for x in ratios[name]))
    errors = {"log p(O) - ELBO - KL": evidence_error(10_000), **gaussian_error(100)}
    print("\nrelative error")
    for name, error in errors.items():
        print(f"{name:<24}{error:>10.1e}")
    core = {"horizons": HORIZONS, "cpu_seconds": table, "ratios": ratios, "relative_errors": errors}
    print(json.dumps({**core, "guidance": bench_guidance.results()}))


if __name__ == "__main__":
    main()
