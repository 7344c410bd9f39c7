"""Plans and training of the maze planner next to the original Diffuser's: `make bench-planning`.

The other side is the recipe of Janner et al. 2022 at its own sizes (configs/diffuser-original-pointmaze-umaze.yaml),
with networks and samplers of this package. Both sides in one run, one thread, CPU time:

- a plan on the U-maze for 1, 20 and 64 states at once, medians of rounds in which all take turns; one of two legs on
  the large maze; a guided plan of hopper (guided_latency.py);
- minutes of training to a score of 100. Ours, whose learning rate decays, is trained anew for 150 steps, 300, 600 and
  so on; the original piece by piece, until it scores 100 or `--minutes` are used up. It is given our tracker as well as
  its own, and the better one counts. What is trained is kept in `--runs`, and the same command goes on from there.

It collects the datasets where they are missing. The last line is one JSON object; ratios are the original's over ours.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from guided_latency import guided_latency

from offline_cai import collect, commands, config, evaluation_commands, seeding
from offline_cai.algorithms.diffuser import Diffuser
from offline_cai.core import Policy
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.evaluation.statistics import paired
from offline_cai.training import checkpoint, experiment

ORIGINAL, OURS, LARGE = (
    "diffuser-original-pointmaze-umaze",
    "planner-pointmaze-umaze",
    "planner-pointmaze-large",
)
TRACKERS = {"its own": "{kp: 1.0, kd: 1.0}", "ours": "{kp: 10.0, kd: 4.0}"}
PIECE = 50  # optimiser steps of the original between evaluations
SHORTEST = 150  # of ours, then twice as many
AVERAGE = "0.98"  # of ours when it is trained so shortly: over the last 50 steps instead of 500
EARLY, STARTS = 20, 50  # episodes of the evaluations while training, and of the last
SEED = 4000  # of starts that nothing was tuned on


def trained(name: str, run: Path, steps: int | None = None, seed: int = 0) -> float:
    """Train a config up to some steps, or to its end; the CPU minutes that it has taken in all."""
    kept = run.with_name(f"{run.name}.cpu.json")
    minutes = json.loads(kept.read_text()) if kept.is_file() else 0.0
    flags = {"seed": str(seed)} | ({} if steps is None else {"training.steps": str(steps)})
    if name == OURS and steps is not None:
        flags["training.ema"] = AVERAGE
    exp = experiment.load(name, flags)
    recipe = collect.recipe_of(exp.data)
    if recipe is not None and not collect.collected(recipe):
        collect.collect(recipe, quiet=True)
    began = time.process_time()
    if not commands.is_run(run) or last_step(run) < exp.training.steps:
        try:
            commands.train(exp, run, resume=commands.is_run(run), quiet=True)
        finally:  # an interrupted training has saved what it did
            minutes += (time.process_time() - began) / 60
            kept.write_text(json.dumps(minutes))
    return minutes


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    rows = file.read_text().splitlines() if file.is_file() else []
    return int(json.loads(rows[-1])["step"]) if rows else 0


def score(run: Path, episodes: int, flags: Mapping[str, str] | None = None) -> evaluation.Result:
    opened = commands.open_run(run, flags)
    protocol = evaluation.protocol(str(opened.experiment.protocol), {"episodes": str(episodes), "seed": str(SEED)})
    policies: dict[str, Callable[[], Policy]] = {"planner": lambda: opened.algorithm.policy(seed=SEED)}
    return evaluation.evaluate(protocol, policies, opened.algorithm.spec, quiet=True)["planner"]


def references(run: Path, episodes: int) -> dict[str, evaluation.Result]:
    opened = commands.open_run(run)
    exp, algorithm = opened.experiment, opened.algorithm
    assert isinstance(algorithm, Diffuser)
    protocol = evaluation.protocol(str(exp.protocol), {"episodes": str(episodes), "seed": str(SEED)})
    policies = evaluation_commands.reference_policies(protocol, exp.dataset, algorithm.config.planner, 1)
    return evaluation.evaluate(protocol, policies, algorithm.spec, quiet=True)


def to_hundred(name: str, runs: Path, most: float, trackers: Mapping[str, str], anew: bool) -> dict[str, Any]:
    """Train longer and longer until a tracker scores 100, or for so many CPU minutes; with the scores on the way.

    `anew` begins each time from the first step, with a schedule of that length; otherwise the run goes on.
    """
    kept = runs / f"{name}.curve.json"
    curve: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []
    while not curve or (max(curve[-1]["scores"].values()) < 100 and curve[-1]["minutes"] < most):
        steps = SHORTEST << len(curve) if anew else PIECE * (len(curve) + 1)
        run = runs / (f"{name}-{steps}" if anew else name)
        minutes = trained(name, run, steps)
        scores = {
            label: float(np.mean(score(run, EARLY, {"planner.tracker": gains} if gains else None).scores))
            for label, gains in trackers.items()
        }
        curve.append({"steps": steps, "minutes": minutes, "scores": scores})
        kept.write_text(json.dumps(curve, indent=1))
        shown = ", ".join(f"{label} {value:.1f}" for label, value in scores.items())
        print(f"{name}: {steps} steps, {minutes:.1f} CPU minutes, score with the tracker: {shown}", flush=True)
    return {"reached": max(curve[-1]["scores"].values()) >= 100, "minutes": curve[-1]["minutes"], "curve": curve}


def plan_times(planners: Mapping[str, Diffuser], batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds of CPU time of a plan, of each planner, for so many states at once."""
    times: dict[str, list[float]] = {name: [] for name in planners}
    for number in range(rounds):
        for name, planner in planners.items():
            store = np.zeros((batch, planner.spec.obs_width), np.float32)
            for field in ("achieved_goal", "observation"):
                store[:, planner.spec.columns(field)[:2]] = STATES[name][0]
            store[:, planner.spec.columns("desired_goal")] = STATES[name][1]
            began = time.process_time()
            planner.plan(store, seeding.keys(SEED, number, torch.arange(batch)))
            times[name].append(1000 * (time.process_time() - began) / batch)
    return {name: median(some) for name, some in times.items()}


STATES = {"ours": ((-1.0, 1.0), (-1.0, -1.0)), "original": ((-1.0, 1.0), (-1.0, -1.0)), "large": ((-4.5, 3), (3.5, -3))}
"""Where the plans that are timed begin and end, in metres."""


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench-planning"), help="where what is trained is kept")
    parser.add_argument("--minutes", type=float, default=60, help="CPU minutes of training for the original at most")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the timings")
    arguments = parser.parse_args()
    runs: Path = arguments.runs
    runs.mkdir(parents=True, exist_ok=True)

    ours = to_hundred(OURS, runs, arguments.minutes, {"its own": ""}, anew=True)
    original = to_hundred(ORIGINAL, runs, arguments.minutes, TRACKERS, anew=False)
    minutes, composed = trained(OURS, runs / "ours"), trained(LARGE, runs / "large")

    final = score(runs / "ours", STARTS)
    best = max(original["curve"][-1]["scores"], key=original["curve"][-1]["scores"].get)
    theirs = score(runs / ORIGINAL, STARTS, {"planner.tracker": TRACKERS[best]})
    beside = references(runs / "ours", STARTS)
    print(f"\nscores over {STARTS} starts of their own, ± standard error of the mean")
    rows = {f"ours, {minutes:.1f} CPU minutes": final, f"original, {original['minutes']:.1f} CPU minutes": theirs}
    for label, result in {**rows, **beside}.items():
        s, d = result.summary, paired(final.scores, result.scores)
        print(f"  {label:<34}{s.mean:>8.1f} ± {s.se:<6.1f}ours less it {d.mean:+.1f} ± {d.se:.1f}")

    loaded = {"ours": runs / "ours", "original": runs / ORIGINAL, "large": runs / "large"}
    planners: dict[str, Diffuser] = {}
    for name, run in loaded.items():
        algorithm = checkpoint.load(run)
        assert isinstance(algorithm, Diffuser)
        planners[name] = algorithm.eval()
    latency = {batch: plan_times(planners, batch, arguments.rounds) for batch in (1, 20, 64)}
    print("\nmilliseconds of CPU time of a plan, so many at once")
    for batch, found in latency.items():
        ratio = found["original"] / found["ours"]
        shown = "".join(f"   {name} {value:.1f}" for name, value in found.items())
        print(f"  {batch:>3}{shown}   original / ours {ratio:.0f}")
    guided = guided_latency(arguments.rounds)
    print("  guided, hopper: " + ", ".join(f"{name} {value:.1f}" for name, value in guided.items()))

    early = [max(point["scores"].values()) for point in original["curve"] if point["minutes"] <= minutes]
    result = {
        "latency_ratio": latency[1]["original"] / latency[1]["ours"],
        "plan_ms": latency[1]["ours"],
        "composed_plan_ms": latency[1]["large"],
        **guided,
        "train_minutes_to_100": ours["minutes"],
        "reached_100": ours["reached"],
        "original_train_minutes_to_100": original["minutes"],
        "original_reached_100": original["reached"],
        "train_minutes_ratio": original["minutes"] / ours["minutes"],
        "score": final.summary.mean,
        "score_se": final.summary.se,
        "original_score": theirs.summary.mean,
        "original_score_at_equal_training": max(early, default=None),
        "score_ratio": final.summary.mean / max(early) if early and max(early) > 0 else None,
        "score_ratio_at_the_end": final.summary.mean / theirs.summary.mean if theirs.summary.mean > 0 else None,
        "controller": beside["controller without noise"].summary.mean,
        "occupancy_path": beside["occupancy path"].summary.mean,
        "train_minutes": minutes,
        "large_train_minutes": composed,
        "plan_ms_by_batch": latency,
        "planners": {name: config.to_dict(p.config.planner) for name, p in planners.items()},
        "original_curve": original["curve"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
