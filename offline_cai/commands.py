"""What the commands do: each works on the output of the one before, in one folder per run."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_cai import collect as collecting
from offline_cai import config, report, seeding
from offline_cai.algorithms.diffuser import Diffuser
from offline_cai.core import Algorithm, Policy
from offline_cai.data import minari
from offline_cai.environments.make import env_spec, make, vectorise
from offline_cai.environments.maze2d import Maze
from offline_cai.environments.rollout import starts
from offline_cai.errors import UserError
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.evaluation import plots, references
from offline_cai.planning.planner import Planner
from offline_cai.planning.tracking import Tracker
from offline_cai.provenance import versions
from offline_cai.training import checkpoint, experiment, loop
from offline_cai.training.experiment import Experiment


def new_run(name: str) -> Path:
    """runs/NAME/DATE-TIME."""
    return Path("runs") / name / datetime.now().strftime("%Y-%m-%d-%H%M%S")


@contextmanager
def new_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which takes the place `target` when it is complete.

    Raises:
        UserError: the place is taken, and it was not said to overwrite.
    """
    if target.exists() and not overwrite:
        raise UserError(
            f"{target} exists already and is not overwritten: pass --overwrite, or name another with --output."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield temporary
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def stage(run: Path, name: str) -> Iterator[None]:
    """Notes how long a stage of a run took, in RUN/stages.json."""
    began = time.monotonic()
    yield
    note_stage(run, name, time.monotonic() - began)


def note_stage(run: Path, name: str, seconds: float) -> None:
    path = run / "stages.json"
    stages = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stages, name: seconds}, indent=1))


# Train ---------------------------------------------------------------------------------------------------------------


def train(exp: Experiment, output: Path | None = None, resume: bool = False, quiet: bool = False) -> Path:
    """Train an experiment; returns the run's folder."""
    run = output or new_run(exp.name)
    began = time.monotonic()
    loop.train(exp, run, resume, quiet)
    note_stage(run, "train", time.monotonic() - began)
    return run


def resumed(run: Path, flags: Mapping[str, str]) -> Experiment:
    """The experiment of an earlier run."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} holds no config.yaml: it is no run's folder.")
    return experiment.parse(config.override(config.read(path), flags), str(path))


def open_run(path: Path) -> tuple[Path, Experiment, Algorithm]:
    """A run's folder, its experiment and its algorithm, from the folder or from one of its checkpoints."""
    chosen = checkpoint.find(path)
    run = next((folder for folder in (path, *path.resolve().parents) if (folder / "config.yaml").is_file()), None)
    if run is None:
        raise UserError(f"no config.yaml beside or above {path}: name a run's folder.")
    return run, resumed(run, {}), checkpoint.load(chosen)


# Plan ----------------------------------------------------------------------------------------------------------------


def plan(run: Path, count: int, seed: int, output: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Sample plans for new start and goal pairs; writes plans.npz, plans.png, denoising.gif and plans.json."""
    run, exp, algorithm = open_run(run)
    if not isinstance(algorithm, Diffuser):
        raise UserError(f"{exp.algorithm} does not plan: it acts step by step. `offline-cai evaluate {run}` runs it.")
    if count < 1:
        raise UserError(f"--count is {count}; ask for one plan or more.")
    source = minari.load(exp.dataset).spec.env_spec
    if source is None:
        raise UserError(f"the dataset {exp.dataset!r} names no environment to draw starts and goals from.")
    envs = vectorise(lambda: make(source.id, source.kwargs), count)
    spec, maze = env_spec(envs.env_fns[0]()), Maze.of(envs.env_fns[0]())  # type: ignore[attr-defined]
    obs = starts(envs, spec, seed)
    envs.close()
    key = torch.tensor([seeding.key(seed, i) for i in range(count)])
    began = time.perf_counter()
    rows = algorithm.plan(obs, key).obs.double().numpy()
    seconds = time.perf_counter() - began
    goals = obs[:, spec.columns("desired_goal")]
    paths = _dense(algorithm, rows)
    crossing = np.mean([any(maze.walls[maze.cell(point)] for point in path) for path in paths])
    facts = {
        "plans": count,
        "seed": seed,
        "milliseconds per plan, all at once": 1000 * seconds / count,
        "share of plans that cross a wall": float(crossing),
        "rows": algorithm.config.rows,
        "stride": algorithm.config.stride,
        "sampler": f"{algorithm.config.planner.sampler}, {algorithm.config.planner.steps} steps",
    }
    with stage(run, "plan"), new_folder(output or run / "plans", overwrite) as folder:
        np.savez(folder / "plans.npz", obs=obs, rows=rows, paths=paths)
        panels = [(p, g, r[:, :2]) for p, g, r in zip(paths, goals, rows, strict=True)][:8]
        (folder / "plans.png").write_bytes(plots.png(plots.grid(maze, panels)))
        trace = algorithm.denoising(obs[:1], key[:1], min(24, algorithm.config.levels))
        frames = np.stack([step.obs[0, :, :2].numpy() for step in trace])
        plots.animation(folder / "denoising.gif", maze, frames, goals[0])
        (folder / "plans.json").write_text(json.dumps(facts, indent=1))
    return facts


def _dense(algorithm: Diffuser, rows: np.ndarray) -> np.ndarray:
    """Positions [N, L, 2] at every time step of planned rows."""
    tracker = algorithm.config.planner.tracker
    return tracker.states(rows, algorithm.config.stride, algorithm.spec.dt or 1.0)[..., : len(tracker.position)]


# Evaluate ------------------------------------------------------------------------------------------------------------


def evaluate(
    run: Path,
    name: str | None = None,
    flags: Mapping[str, str] | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's policy and the protocol's references on the same starts; writes results.json and paths.npz."""
    began = time.monotonic()
    run, exp, algorithm = open_run(run)
    name = name or exp.protocol
    if name is None:
        raise UserError(
            f"{run / 'config.yaml'} names no protocol: choose one with --protocol, of {config.names('eval')}."
        )
    protocol = evaluation.protocol(name, flags)
    target = output or run / "evaluation"
    if target.exists() and not overwrite:  # said before the work, not after it
        raise UserError(
            f"{target} exists already and is not overwritten: pass --overwrite, or name another with --output."
        )
    policy = algorithm.policy(seed=protocol.seed)
    label = "planner" if isinstance(policy, Planner) else exp.algorithm
    policies: dict[str, Callable[[], Policy]] = {label: lambda: policy}
    policies |= _references(protocol, exp, algorithm, policy)
    results = evaluation.evaluate(protocol, policies, quiet)
    data = {
        "protocol": config.to_dict(protocol),
        "policy": label,
        "results": {key: result.to_json() for key, result in results.items()},
        "paired": {key: _paired(results[label], result) for key, result in results.items() if key != label},
        "planner": _explain(policy, algorithm),
        "checkpoint": str(checkpoint.find(run).relative_to(run)),
        "versions": versions(),
    }
    with new_folder(target, overwrite) as folder:
        (folder / "results.json").write_text(json.dumps(data, indent=1))
        paths = {key: np.stack([e.obs for e in result.episodes]) for key, result in results.items() if _even(result)}
        arrays: dict[str, Any] = {key: value.astype(np.float32) for key, value in paths.items()}
        np.savez_compressed(folder / "paths.npz", **arrays)
        _draw_paths(folder / "paths.png", protocol, results)
    note_stage(run, "evaluate", time.monotonic() - began)
    return data


def _draw_paths(path: Path, protocol: evaluation.Protocol, results: Mapping[str, evaluation.Result]) -> None:
    """The first forty executed paths of each policy, where the environment is a maze."""
    env = protocol.make()
    if hasattr(env.unwrapped, "maze"):
        spec = env_spec(env)
        position, goal = spec.columns("achieved_goal"), spec.columns("desired_goal")
        paths = {name: [e.obs[:, position] for e in result.episodes[:40]] for name, result in results.items()}
        target = next(iter(results.values())).episodes[0].obs[0, goal]
        path.write_bytes(plots.png(plots.executed(Maze.of(env), paths, target)))
    env.close()


def _even(result: evaluation.Result) -> bool:
    return len({len(episode.obs) for episode in result.episodes}) == 1


def _references(
    protocol: evaluation.Protocol, exp: Experiment, algorithm: Algorithm, policy: Policy
) -> dict[str, Callable[[], Policy]]:
    if not protocol.references:
        return {}
    env = protocol.make()
    behaviour = minari.metadata(minari.load(exp.dataset)).get("recipe", {}).get("behaviour", {})
    setting = references.Setting(
        spec=env_spec(env),
        maze=Maze.of(env),
        data=minari.trajectories(exp.dataset),
        behaviour=behaviour,
        tracker=policy.tracker if isinstance(policy, Planner) else Tracker(),
        stride=algorithm.needs.stride,
        seed=protocol.seed,
    )
    env.close()
    found = {name: references.find(name) for name in protocol.references}
    return {name: lambda make=make: make(setting) for name, make in found.items()}  # type: ignore[misc]


def _paired(ours: evaluation.Result, other: evaluation.Result) -> dict[str, float]:
    """Mean difference of normalised scores on the same starts, and its standard error."""
    difference = ours.normalised - other.normalised
    se = float(difference.std(ddof=1) / np.sqrt(len(difference))) if len(difference) > 1 else float("nan")
    return {"mean": float(difference.mean()), "se": se}


def _explain(policy: Policy, algorithm: Algorithm) -> dict[str, Any]:
    if not isinstance(policy, Planner) or not isinstance(algorithm, Diffuser):
        return {}
    c = algorithm.config
    return {
        "horizon in steps": c.rows * c.stride,
        "rows": c.rows,
        "stride": c.stride,
        **config.to_dict(c.planner),
        "tracker": asdict(policy.tracker),
        "plans": policy.plans_made,
        "milliseconds per plan": 1000 * policy.seconds / max(policy.plans_made, 1),
    }


# Demo ----------------------------------------------------------------------------------------------------------------


def demo(name: str, flags: Mapping[str, str], output: Path | None = None, quiet: bool = False) -> Path:
    """The main job in five steps: collect, train, plan, evaluate, report. Returns the report's path."""
    exp = experiment.load(name, dict(flags))
    recipe = collecting.recipe_of(exp.dataset)
    if recipe is None:
        raise UserError(f"no recipe in datasets/ collects {exp.dataset!r}: the demo cannot begin.")
    run = output or new_run(exp.name)
    print(f"demo: {exp.name}, seed {exp.seed}, into {run}")
    print("[1/5] collect " + recipe.id, flush=True)
    if collecting.collected(recipe):
        print(f"      already collected by this recipe, with its seed {recipe.seed}: used as it is")
    else:
        collecting.collect(recipe, quiet)
    seconds = minari.metadata(minari.load(recipe.id))["seconds"]
    print(f"[2/5] train {exp.algorithm} for {exp.training.steps} steps", flush=True)
    train(exp, run, quiet=quiet)
    note_stage(run, "collect", seconds)
    print("[3/5] plan for new starts and goals", flush=True)
    if exp.algorithm == "diffuser":
        plan(run, count=16, seed=exp.seed + 1)
    print(f"[4/5] evaluate under {exp.protocol}", flush=True)
    data = evaluate(run, quiet=quiet)
    print("[5/5] report", flush=True)
    path = report.write(run)
    print(f"report: {path.resolve()}\n{report.score_line(data)}")
    return path
