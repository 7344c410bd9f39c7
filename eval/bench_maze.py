"""What the maze planner reaches, and where a path over the data's grid cannot follow: `make bench-maze`.

- `scores`: D4RL's maze2d protocol on starts that nothing was tuned on, for each maze and training seed, beside the
  controller whose data it learned from, the shortest path over the data's occupancy grid with the planner's own
  pursuit, random actions, and an upper bound: the shortest path with the map and the same pursuit.
- `goals`: another goal in each episode, no retraining.
- `obstacle`: a circle that was not in the data, avoided by evidence alone.
- `routes`: a start with two ways to its goal, and a reward for one: the mass of the ways among steered plans, beside
  that of many unguided ones reweighted.
- `evidence`: which learned evidence tells paths that cross walls, by the area under the curve.

It collects and trains what `--runs` does not hold yet, and keeps each part there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_planning import trained
from scipy.stats import mannwhitneyu

from offline_cai import commands, evaluation_commands, seeding
from offline_cai.algorithms.diffuser import Diffuser
from offline_cai.core import Policy, Spec
from offline_cai.data import catalogue
from offline_cai.environments.make import env_spec
from offline_cai.environments.maze2d import Maze
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.evaluation.statistics import paired
from offline_cai.planning.occupancy import OccupancyPaths
from offline_cai.planning.planner import Planner
from offline_cai.planning.support import Denoised, Nearest, dense

MAZES = ("umaze", "medium", "large")
SEED = 5000  # of the starts
BALL = 0.1  # metres: the radius of the point


def opened(name: str, runs: Path, seed: int = 0, flags: Mapping[str, str] | None = None) -> Diffuser:
    run = runs / f"{name}-{seed}"
    minutes = trained(f"planner-pointmaze-{name}", run, seed=seed)
    algorithm = commands.open_run(run, flags).algorithm
    assert isinstance(algorithm, Diffuser)
    algorithm.eval()
    MINUTES[f"{name}-{seed}"] = minutes
    return algorithm


MINUTES: dict[str, float] = {}
"""CPU minutes of the trainings that were opened."""


def protocol_of(name: str, episodes: int, goals: bool = False) -> evaluation.Protocol:
    words = {"episodes": str(episodes), "seed": str(SEED)}
    return evaluation.protocol(f"maze2d-{name}-goals" if goals else f"maze2d-{name}", words)


def with_the_map(spec: Spec, maze: Maze, diffuser: Diffuser) -> Policy:
    """The shortest path that keeps the ball off the walls, pursued as plans are."""
    half = np.array(maze.walls.shape[::-1]) / 2 * maze.size
    axes = [np.arange(-h, h, 0.025) for h in half]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    shifts = [BALL * np.array([i, j]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    free = points[~np.stack([maze.blocked(points + shift) for shift in shifts]).any(0)]
    states = np.concatenate([free, np.full_like(free, 2.0)], axis=1)
    position, goal = (np.array(spec.columns(name)) for name in ("achieved_goal", "desired_goal"))
    paths = OccupancyPaths(states, position, goal, 1, spec.dt or 0.01)
    c = diffuser.config.planner
    return Planner(spec, ("observation",), paths, SEED, c.tracker, "pursue", pursuit=c.pursuit)


def evaluated(
    protocol: evaluation.Protocol, diffusers: Mapping[str, Diffuser], dataset: str, beside: bool = True
) -> tuple[dict[str, evaluation.Result], dict[str, Planner]]:
    """Results of planners and references on the same starts, and the planners, which tell how they chose."""
    first = next(iter(diffusers.values()))
    planners = {name: diffuser.policy(seed=SEED) for name, diffuser in diffusers.items()}
    policies: dict[str, Callable[[], Policy]] = {name: lambda p=p: p for name, p in planners.items()}  # type: ignore[misc]
    if beside:
        policies |= evaluation_commands.reference_policies(protocol, dataset, first.config.planner, 1)
        env = protocol.make()
        maze, spec = Maze.of(env), env_spec(env)
        env.close()
        policies["shortest path with the map"] = lambda: with_the_map(spec, maze, first)
    return evaluation.evaluate(protocol, policies, first.spec, quiet=True), planners


def told(planner: Planner) -> dict[str, Any]:
    total, steps = planner.deviation
    return {
        "ms_per_plan": 1000 * planner.seconds / planner.plans_made,
        "feasible_candidates": float(np.mean(planner.feasible)) if planner.feasible else None,
        "plans_without": sum(share == 0 for share in planner.feasible),
        "effective_sample_size": float(np.mean(planner.effective)),
        "deviation_m": total / max(steps, 1),
        "rejected": dict(planner.rejected),
    }


def scores(runs: Path, episodes: int, seeds: int) -> dict[str, Any]:
    return {name: table(name, runs, episodes, range(seeds)) for name in MAZES}


def goals(runs: Path, episodes: int, seeds: int) -> dict[str, Any]:
    return {name: table(name, runs, episodes, range(1), goals=True) for name in MAZES}


def table(name: str, runs: Path, episodes: int, seeds: range, goals: bool = False) -> dict[str, Any]:
    diffusers = {f"planner, training seed {seed}": opened(name, runs, seed) for seed in seeds}
    protocol = protocol_of(name, episodes, goals)
    results, planners = evaluated(protocol, diffusers, f"offline-cai/pointmaze/{name}-v0")
    print(f"\n{protocol.name}, {episodes} starts: score ± standard error; failures; the planners less it, pooled")
    ours = np.mean([results[label].scores for label in diffusers], axis=0)
    found: dict[str, Any] = {"seeds": [results[label].summary.mean for label in diffusers]}
    for label, result in results.items():
        s, d = result.summary, paired(ours, result.scores)
        failed = int((result.returns == 0).sum())
        print(f"  {label:<28}{s.mean:>8.1f} ± {s.se:<5.1f}{failed:>4}   {d.mean:+.1f} ± {d.se:.1f}", flush=True)
        found[label] = {"score": s.mean, "se": s.se, "failed": failed, "ours_less": d.mean, "ours_less_se": d.se}
        if label in planners:
            found[label] |= told(planners[label])
    found["train_minutes"] = [MINUTES[f"{name}-{seed}"] for seed in seeds]
    return found


OBSTACLE = {"centre": [0.5, 0.75], "radius": 0.3}
"""In the upper corridor of the U-maze, which is 1 m wide: it leaves way on one side."""


def obstacle(runs: Path, episodes: int, seeds: int) -> dict[str, Any]:
    circle = f"[{{columns: [0, 1], centre: {OBSTACLE['centre']}, radius: {OBSTACLE['radius']}, width: 0.02}}]"
    many = {"planner.candidates": "64", "planner.detours": "64"}
    with_it, near = {**many, "planner.evidence.outside": circle}, {"planner.pursuit.lookahead": "0.3"}
    diffusers = {
        "without the evidence": opened("umaze", runs, flags=many),
        "with it": opened("umaze", runs, flags=with_it),
        "without it, pursued 0.3 m ahead": opened("umaze", runs, flags={**many, **near}),
        "with it, pursued 0.3 m ahead": opened("umaze", runs, flags={**with_it, **near}),
    }
    protocol = protocol_of("umaze", episodes)
    results, planners = evaluated(protocol, diffusers, "offline-cai/pointmaze/umaze-v0", beside=False)
    spec, found = next(iter(diffusers.values())).spec, {}
    print(f"\nobstacle {OBSTACLE} on the U-maze, {episodes} starts")
    for label, result in results.items():
        paths = [e.obs[:, spec.columns("achieved_goal")] for e in result.episodes]
        nearest = [float(np.linalg.norm(p - np.array(OBSTACLE["centre"]), axis=1).min()) for p in paths]
        entered = sum(distance < OBSTACLE["radius"] for distance in nearest)
        s = result.summary
        found[label] = {"score": s.mean, "se": s.se, "entered": entered, "nearest_m": min(nearest)}
        found[label] |= told(planners[label])
        share = found[label]["feasible_candidates"]
        print(f"  {label:<38} score {s.mean:.1f} ± {s.se:.1f}, entered {entered}, feasible candidates {share:.2f}")
    return found


START, GOAL, WAY = ((5, 1), (4, 1)), (4, 4), (6, 2)
"""Cells of the medium maze: from between the first two, ways of as many cells lead round a block to the next; the
reward is for the one through the last."""


def routes(runs: Path, episodes: int, seeds: int) -> dict[str, Any]:
    env = protocol_of("medium", 10).make()
    maze, spec = Maze.of(env), env_spec(env)
    env.close()
    obs = np.zeros((1, spec.obs_width), np.float32)
    for field in ("achieved_goal", "observation"):
        obs[:, spec.columns(field)[:2]] = np.mean([maze.position(cell) for cell in START], axis=0)
    obs[:, spec.columns("desired_goal")] = maze.position(GOAL)
    target = [float(v) for v in maze.position(WAY)]
    reward = {"planner.evidence.goals": f"[{{target: {target}, columns: [0, 1], width: 0.5, row: null}}]"}
    alone = {"planner.evidence.length": "0", "planner.evidence.support": "0", "planner.detours": "0"}
    sampler = {"planner.sampler": "ddpm", "planner.steps": "16"}
    found: dict[str, Any] = {}
    print("\ntwo ways on the medium maze: mass of the one that a reward is for")
    for label, count, extra in (
        ("unguided", 4096, {}),
        ("reweighted, 4096 samples", 4096, {}),
        ("reweighted, 64 samples", 64, {}),
        ("64 particles, through the denoiser", 64, {"planner.guide": "through_denoiser"}),
    ):
        particles = "planner.guide" in extra
        many = {"planner.particles": str(count), "planner.candidates": "1"} if particles else {}
        many = many or {"planner.candidates": str(count)}
        diffuser = opened("medium", runs, flags={**reward, **alone, **sampler, **many, **extra})
        times = 1 if count > 1000 else 16
        began = time.process_time()
        plans = diffuser.plan(np.repeat(obs, times, axis=0), seeding.keys(3, 0, torch.arange(times)))
        seconds = (time.process_time() - began) / times
        near = (plans.obs[..., :2] - torch.tensor(target)).norm(dim=-1).amin(-1) < 0.6  # [times, n]
        weight = torch.full_like(plans.log_weight, 1 / count) if label == "unguided" else plans.log_weight.exp()
        mass = (weight * near).sum(1)
        se = float(mass.std() / times**0.5) if times > 1 else None
        found[label] = {"mass": float(mass.mean()), "se": se, "seconds_per_plan": seconds}
        print(f"  {label:<36}{found[label]['mass']:.3f}" + (f" ± {se:.3f}" if se else ""), flush=True)
    return found


def evidence(runs: Path, episodes: int, seeds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    print("\nwhich evidence tells direct candidates that cross a wall from those that do not (area under the curve)")
    for name in MAZES:
        diffuser = opened(name, runs, flags={"planner.candidates": "16", "planner.detours": "0"})
        store = catalogue.trajectories(f"offline-cai/pointmaze/{name}-v0")
        protocol = protocol_of(name, 10)
        env = protocol.make()
        maze, first = Maze.of(env), [env.reset(seed=SEED + i)[0] for i in range(40)]
        env.close()
        obs = np.stack([np.concatenate([o[field.name] for field in diffuser.spec.obs]) for o in first])
        diffuser.requires_grad_(False)
        plans = diffuser.plan(obs, seeding.keys(4, 0, torch.arange(len(obs))))
        rows = plans.obs.flatten(0, 1)
        crosses = np.array([maze.blocked(path).any() for path in dense(rows[..., :2]).numpy()])
        states = np.asarray(store.obs[:, store.spec.columns("achieved_goal")])
        episode = np.repeat(np.arange(store.num_episodes), store.lengths + 1)
        assert plans.nats is not None and plans.steps is not None
        level = torch.zeros(len(rows), dtype=torch.int64)
        x = diffuser.encode(plans._replace(obs=rows[:, None], steps=plans.steps.flatten()[:, None]))
        nearest = [Nearest((0, 1), states, episode, 1.0, every) for every in (1, 10)]
        alternatives = {
            "occupancy": plans.nats["support"].flatten(),
            "nearest state": nearest[0](rows, level, 1.0),
            "nearest of every tenth state": nearest[1](rows, level, 1.0),
            "denoising": Denoised(diffuser.denoise, diffuser.schedule, diffuser.config.levels // 4, 1.0)(x, level, 1.0),
        }
        found[name] = {"crossing": float(crosses.mean())}
        if 0 < crosses.sum() < len(crosses):
            for label, value in alternatives.items():
                below = mannwhitneyu(value[~crosses].numpy(), value[crosses].numpy()).statistic
                found[name][label] = float(below / (crosses.sum() * (~crosses).sum()))
        print(f"  {name}: " + ", ".join(f"{label} {value:.3f}" for label, value in found[name].items()), flush=True)
    return found


PARTS = {"scores": scores, "goals": goals, "obstacle": obstacle, "routes": routes, "evidence": evidence}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-maze"), help="where what is trained is kept")
    parser.add_argument("--episodes", type=int, default=50, help="starts of each evaluation")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each maze")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts alone")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in PARTS:
        kept = arguments.runs / f"{name}.json"
        if name in arguments.only:
            found[name] = PARTS[name](arguments.runs, arguments.episodes, arguments.seeds)
            kept.write_text(json.dumps(found[name], indent=1))
        elif kept.is_file():
            found[name] = json.loads(kept.read_text())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
