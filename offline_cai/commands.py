"""What the commands do: each works on the output of the one before, in one folder per run."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from gymnasium.vector.utils import concatenate, create_empty_array
from torch import Tensor

from offline_cai import config, seeding
from offline_cai.algorithms.diffuser import Diffuser
from offline_cai.algorithms.guide import Guide
from offline_cai.core import Algorithm, Plan, Spec
from offline_cai.data import catalogue
from offline_cai.environments.make import env_spec, make
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation import plots
from offline_cai.files import read_json, write_text
from offline_cai.inference.smc import effective_sample_size
from offline_cai.planning.config import PlannerConfig
from offline_cai.planning.support import dense
from offline_cai.spaces import flatten, require_same_spec
from offline_cai.training import checkpoint, experiment, loop, processes
from offline_cai.training.experiment import Experiment
from offline_cai.training.folder import is_run


def new_run(name: str) -> Path:
    """A new folder runs/NAME/DATE-TIME, with a number behind it where two runs begin in one second."""
    stem = Path("runs") / name / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    for number in count(1):
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        with suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("unreachable")


@contextmanager
def new_folder(target: Path, overwrite: bool, files: set[str]) -> Iterator[Path]:
    """A folder to fill with `files`, which takes the place `target` when the work inside is done.

    Raises:
        UserError: before the work, if the place is taken and it was not said to overwrite, or if what is there is not
            such a folder; and if the disk refuses.
    """
    if target.exists():
        if not overwrite:
            raise UserError(
                f"{target} exists already and is not overwritten: pass --overwrite, or name another with --output."
            )
        foreign = {path.name for path in target.iterdir()} - files if target.is_dir() else {target.name}
        if foreign:
            raise UserError(f"{target} holds {min(foreign)!r}, which is not this command's: nothing is replaced.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}.") from error
    aside = temporary.with_name(f"{temporary.name}.replaced")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if target.exists():
            os.replace(target, aside)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}.") from error
    finally:
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def note_stage(run: Path, name: str, seconds: float, add: bool = False) -> None:
    """Notes how long a stage of a run took, in RUN/stages.json; with `add`, on top of what it took before."""
    path = run / "stages.json"
    stages = read_json(path) if path.exists() else {}
    before = stages.get(name, 0.0) if add else 0.0
    write_text(path, json.dumps({**stages, name: before + seconds}, indent=1))


# Train ---------------------------------------------------------------------------------------------------------------


def train(
    exp: Experiment, output: Path | None = None, resume: bool = False, quiet: bool = False, asked: int | None = None
) -> Path:
    """Train an experiment; returns the run's folder.

    Args:
        resume: whether to go on if `output` holds a run.
        asked: the number of processes that this one is to be of; None: as many as were started.
    """
    began = time.monotonic()
    accelerator = processes.join(exp.training, asked)
    places = [(output or new_run(exp.name), resume and output is not None and is_run(output))]
    run, resume = broadcast_object_list(places if accelerator.is_main_process else [None])[0]
    try:
        loop.train(exp, run, resume, quiet, accelerator)
    except Interrupted:
        if accelerator.is_main_process:
            note_stage(run, "train", time.monotonic() - began, add=resume)
        raise
    if accelerator.is_main_process:
        note_stage(run, "train", time.monotonic() - began, add=resume)
    return run


def resumed(run: Path, flags: Mapping[str, str]) -> Experiment:
    """The experiment of an earlier run, with flags over it."""
    path = run / "config.yaml"
    if not is_run(run):
        raise UserError(f"{run} holds no config.yaml: it is no run's folder.")
    for name in flags:
        if name not in experiment.RESUMABLE:
            allowed = ", ".join(experiment.RESUMABLE)
            raise UserError(f"--{name} cannot change on a resume (only {allowed} can): start a new run.")
    return experiment.parse(config.override(config.read(path), flags), str(path))


class Run(NamedTuple):
    """A run's folder, its experiment, one of its checkpoints, and the algorithm in it."""

    folder: Path
    experiment: Experiment
    checkpoint: Path
    algorithm: Algorithm


def open_run(path: Path, flags: Mapping[str, str] | None = None) -> Run:
    """A run, from its folder (its last checkpoint) or from one of its checkpoints; on the GPU if there is one.

    `flags` such as {"planner.steps": "8"} change how it plans.
    """
    chosen = checkpoint.find(path)
    folder = next((f for f in (path, *path.resolve().parents) if is_run(f)), None)
    if folder is None:
        raise UserError(f"no config.yaml beside or above {path}: name a run's folder.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(folder, resumed(folder, {}), chosen, checkpoint.load(chosen, device))
    if flags:
        _set_planner(run, flags)
    return run


def _set_planner(run: Run, flags: Mapping[str, str]) -> None:
    diffuser = diffuser_of(run.algorithm)
    for name in flags:
        if diffuser is None or not name.startswith("planner."):
            raise UserError(
                f"--{name} sets nothing here: only fields of a planner, such as --planner.steps, can be set."
            )
    assert diffuser is not None
    planner = config.override({"planner": config.to_dict(diffuser.config.planner)}, flags)["planner"]
    diffuser.plan_as(config.build(PlannerConfig, planner, "--planner"))


def diffuser_of(algorithm: Algorithm) -> Diffuser | None:
    """The Diffuser that plans, with its learned return if it has one; None for what does not plan."""
    if isinstance(algorithm, Guide):
        return algorithm.guided()
    return algorithm if isinstance(algorithm, Diffuser) else None


# Plan ----------------------------------------------------------------------------------------------------------------


PLAN_FILES = {"plans.npz", "plans.png", "denoising.gif", "plans.json"}


def plan(
    path: Path,
    count: int,
    seed: int,
    flags: Mapping[str, str] | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Sample plans for new starts (and goals); writes PLAN_FILES, pictures of mazes only.

    `flags` such as {"planner.temperature": "0.2"} change how. Returns the facts of plans.json.
    """
    began = time.monotonic()
    run = open_run(path, flags)
    diffuser = diffuser_of(run.algorithm)
    if diffuser is None:
        raise UserError(f"{run.experiment.algorithm} does not plan: it acts step by step. Evaluate it instead.")
    if not 1 <= count <= 10_000:
        raise UserError(f"--count is {count}; ask for 1 to 10,000 plans.")
    source = catalogue.environment(run.experiment.data)
    if source is None:
        raise UserError(f"the dataset {run.experiment.dataset!r} names no environment to draw starts and goals from.")
    c = diffuser.config
    with new_folder(output or run.folder / "plans", overwrite, PLAN_FILES) as folder:
        obs, maze = _starts(make(*source), diffuser.spec, count, seed)
        key = torch.tensor([seeding.key(seed, i) for i in range(count)])
        before = time.perf_counter()
        temperature = diffuser.temperature(obs, key)
        plans = diffuser.plan(obs, key, temperature)
        seconds = time.perf_counter() - before
        rows = plans.best.obs[:, 0].double().numpy()
        facts = {
            "plans": count,
            "seed": seed,
            "milliseconds per plan, all at once": 1000 * seconds / count,
            "rows": rows.shape[1],
            "stride": c.stride,
            "sampler": f"{c.planner.sampler}, {c.planner.steps} steps",
            **_guidance(c.planner, plans, temperature),
        }
        arrays: dict[str, Any] = {"obs": obs, "rows": rows, "log_weight": plans.log_weight.numpy()}
        if maze is not None:
            arrays["paths"] = _dense(diffuser, rows)
            facts["share of plans that cross a wall"] = float(np.mean([maze.blocked(p).any() for p in arrays["paths"]]))
            _draw_plans(folder, diffuser, maze, arrays, key)
        np.savez(folder / "plans.npz", **arrays)
        (folder / "plans.json").write_text(json.dumps(facts, indent=1))
    note_stage(run.folder, "plan", time.monotonic() - began)
    return {**facts, "written to": str(output or run.folder / "plans")}


def _guidance(c: PlannerConfig, plans: Plan, temperature: float) -> dict[str, Any]:
    """How plans were steered, and what their weights say."""
    if c.guide == "none" and plans.log_weight.shape[1] == 1:
        return {}
    facts: dict[str, Any] = {"guide": c.guide, "temperature": temperature}
    if plans.log_weight.shape[1] > 1:
        facts["effective sample size, mean"] = float(effective_sample_size(plans.log_weight).mean())
    if plans.log_evidence is not None:
        facts["log-evidence, mean, nats"] = float(plans.log_evidence.mean())
    return facts


def _draw_plans(folder: Path, diffuser: Diffuser, maze: Maze, arrays: Mapping[str, np.ndarray], key: Tensor) -> None:
    obs, rows, goals = arrays["obs"], arrays["rows"], arrays["obs"][:, diffuser.spec.columns("desired_goal")]
    panels = [(p, g, r[:, :2]) for p, g, r in zip(arrays["paths"], goals, rows, strict=True)][:8]
    (folder / "plans.png").write_bytes(plots.png(plots.grid(maze, panels)))
    trace = diffuser.denoising(obs[:1], key[:1], min(24, diffuser.config.levels))
    frames = np.stack([step.obs[0, 0, :, :2].numpy() for step in trace])
    plots.animation(folder / "denoising.gif", maze, frames, goals[0])


def _starts(env: gym.Env, spec: Spec, count: int, seed: int) -> tuple[np.ndarray, Maze | None]:
    """First observations [count, O] of the environment, and its maze if it is one; closes it."""
    try:
        require_same_spec(spec, env_spec(env))
        resets = [env.reset(seed=seeding.seed_of(seed, number))[0] for number in range(count)]
        space, rows = env.observation_space, create_empty_array(env.observation_space, count)
        maze = Maze.of(env) if hasattr(env.unwrapped, "maze") else None
        return flatten(space, concatenate(space, resets, rows)), maze  # type: ignore[arg-type]
    finally:
        env.close()


def _dense(algorithm: Diffuser, rows: np.ndarray) -> np.ndarray:
    """Positions [N, L, 2] at every time step of planned rows, or four between rows that have no times."""
    c, tracker = algorithm.config.planner, algorithm.config.planner.tracker
    if c.execute == "pursue":
        return dense(torch.from_numpy(rows[..., list(c.pursuit.position)])).numpy()
    return tracker.states(rows, algorithm.config.stride, algorithm.spec.dt or 1.0)[..., : len(tracker.position)]
