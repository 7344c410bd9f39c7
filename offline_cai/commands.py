"""What the commands do: each works on the output of the one before, in one folder per run."""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
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

from offline_cai import collect as collecting
from offline_cai import config, report, seeding
from offline_cai.algorithms.diffuser import Diffuser
from offline_cai.algorithms.guide import Guide
from offline_cai.core import Algorithm, Episode, Plan, Policy, Spec
from offline_cai.data import catalogue, minari
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.make import env_spec, make
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.evaluation import offpolicy, plots, references
from offline_cai.evaluation.statistics import paired, summarise
from offline_cai.files import read_json, write_text
from offline_cai.inference.smc import effective_sample_size
from offline_cai.planning.planner import Planner
from offline_cai.planning.sampling import PlannerConfig
from offline_cai.planning.tracking import Tracker
from offline_cai.policies.acting import ActorAlgorithm
from offline_cai.provenance import versions
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
    """Positions [N, L, 2] at every time step of planned rows."""
    tracker = algorithm.config.planner.tracker
    return tracker.states(rows, algorithm.config.stride, algorithm.spec.dt or 1.0)[..., : len(tracker.position)]


# Evaluate ------------------------------------------------------------------------------------------------------------


EVALUATION_FILES = {"results.json", "paths.npz", "paths.png", "episodes.npz"}
KEPT = 10  # episodes of the policy whose observations and actions are kept, the first of as many environments


def evaluate(
    path: Path,
    name: str | None = None,
    flags: Mapping[str, str] | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a run's policy and the protocol's references on the same starts.

    `flags` change fields of the protocol, and of the planner where they begin with "planner.". Writes EVALUATION_FILES
    and returns what results.json holds.
    """
    began, flags = time.monotonic(), flags or {}
    planner = {key: value for key, value in flags.items() if key.startswith("planner.")}
    run = open_run(path, planner)
    exp, algorithm = run.experiment, run.algorithm
    name = name or exp.protocol
    if name is None:
        raise UserError(f"{run.folder / 'config.yaml'} names no protocol: choose one with --protocol, of eval/.")
    of_protocol = {key: value for key, value in flags.items() if key not in planner}
    protocol = evaluation.protocol(name, of_protocol).on(exp.dataset)
    with new_folder(output or run.folder / "evaluation", overwrite, EVALUATION_FILES) as folder:
        policy = algorithm.policy(seed=protocol.seed)
        label = "planner" if isinstance(policy, Planner) else exp.algorithm
        policies: dict[str, Callable[[], Policy]] = {label: lambda: policy}
        tracker = policy.tracker if isinstance(policy, Planner) else Tracker()
        policies |= reference_policies(protocol, exp.dataset, tracker, algorithm.needs.stride)
        kept = run.folder / ".evaluation" / _key(run, protocol, policies)
        try:
            results = evaluation.evaluate(protocol, policies, algorithm.spec, quiet, keep=kept)
        except KeyboardInterrupt:
            done = len(list(kept.glob("*.npz")))
            again = "the same command goes on after them."
            raise Interrupted(f"{done} of {len(policies)} policies are evaluated and kept: {again}") from None
        data = {
            "protocol": config.to_dict(protocol),
            "mismatch": protocol.mismatch,
            "policy": label,
            "results": {key: result.to_json() for key, result in results.items()},
            "paired": {
                key: asdict(paired(results[label].scores, result.scores))
                for key, result in results.items()
                if key != label
            },
            "planner": _explain(policy, algorithm),
            "guidance": _guided(policy, algorithm),
            "checkpoint": run.checkpoint.name,
            "versions": versions(),
        }
        (folder / "results.json").write_text(json.dumps(data, indent=1))
        paths = {key: np.stack([e.obs for e in result.episodes]) for key, result in results.items() if _even(result)}
        arrays: dict[str, Any] = {key: value.astype(np.float32) for key, value in paths.items()}
        np.savez_compressed(folder / "paths.npz", **arrays)
        _keep_episodes(folder / "episodes.npz", results[label].episodes, protocol)
        _draw_paths(folder / "paths.png", protocol, results)
    shutil.rmtree(kept.parent, ignore_errors=True)
    note_stage(run.folder, "evaluate", time.monotonic() - began)
    return {**data, "run": str(run.folder)}


def _key(run: Run, protocol: evaluation.Protocol, policies: Mapping[str, Any]) -> str:
    """A hash of what is evaluated: the weights and settings, the protocol, and who is run."""
    diffuser = diffuser_of(run.algorithm)
    planner = None if diffuser is None else config.to_dict(diffuser.config.planner)
    facts = [(run.checkpoint / "manifest.json").read_text(), config.to_dict(protocol), planner, list(policies)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _keep_episodes(path: Path, episodes: list[Episode], protocol: evaluation.Protocol) -> None:
    """The first episode of some environments: observations [L + 1, O] and actions [L, A], one after another."""
    first = episodes[:: protocol.episodes // protocol.environments][:KEPT]
    np.savez_compressed(
        path,
        obs=np.concatenate([e.obs for e in first]).astype(np.float32),
        action=np.concatenate([e.action for e in first]),
        length=np.array([len(e.reward) for e in first]),
    )


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


def reference_policies(
    protocol: evaluation.Protocol, dataset: str | None, tracker: Tracker, stride: int
) -> dict[str, Callable[[], Policy]]:
    """The protocol's references by name: those that need data take them from `dataset`, if there is one."""
    if not protocol.references:
        return {}
    env = protocol.make()
    setting = references.Setting(
        spec=env_spec(env),
        maze=Maze.of(env) if hasattr(env.unwrapped, "maze") else None,
        data=None if dataset is None else catalogue.trajectories(dataset),
        behaviour={} if dataset is None else collecting.controller_arguments(catalogue.note(dataset)),
        tracker=tracker,
        stride=stride,
        seed=protocol.seed,
    )
    env.close()
    found = {name: references.find(name) for name in protocol.references}
    return {name: lambda make=make: make(setting) for name, make in found.items()}  # type: ignore[misc]


def _explain(policy: Policy, algorithm: Algorithm) -> dict[str, Any]:
    diffuser = diffuser_of(algorithm)
    if not isinstance(policy, Planner) or diffuser is None:
        return {}
    c = diffuser.config
    rows = c.planner.rows or c.rows
    milliseconds = 1000 * policy.seconds / max(policy.plans_made, 1)
    return {
        **config.to_dict(c.planner),
        "horizon in steps": rows * c.stride,
        "rows": rows,
        "stride": c.stride,
        "tracker": asdict(policy.tracker),
        **({"plans": policy.plans_made, "milliseconds per plan": milliseconds} if policy.plans_made else {}),
    }


def _guided(policy: Policy, algorithm: Algorithm) -> dict[str, Any]:
    """How the plans that were executed were steered, and what their weights say; empty where nothing was."""
    diffuser = diffuser_of(algorithm)
    if not isinstance(policy, Planner) or diffuser is None:
        return {}
    guide, effective, evidence = diffuser.config.planner.guide, policy.effective, policy.log_evidence
    if not policy.plans_made or (guide == "none" and not effective):
        return {}
    facts: dict[str, Any] = {"guide": guide, "temperature": policy.temperature, "plans": policy.plans_made}
    if effective:
        facts |= {
            "effective sample size, mean": float(np.mean(effective)),
            "effective sample size, lowest": min(effective),
        }
    if evidence:
        facts |= {
            "log-evidence, mean, nats": float(np.mean(evidence)),
            "log-evidence, lowest, nats": min(evidence),
        }
    return facts


OFF_POLICY_FILES = {"estimates.json"}


def off_policy(
    path: Path,
    flags: Mapping[str, str] | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Estimate what a run's policy would earn, from its dataset alone; writes OFF_POLICY_FILES, returns what it holds.

    Fitted Q evaluation is of the policy as it acts, importance sampling of the distribution that it acts by, where the
    algorithm has one and the dataset keeps log-probabilities. `flags` set fields of `OffPolicy`.

    Raises:
        UserError: the algorithm plans, or the run has no dataset.
    """
    began, run = time.monotonic(), open_run(path)
    exp, algorithm = run.experiment, run.algorithm
    c = config.build(offpolicy.OffPolicy, config.override({}, flags or {}), "--off-policy")
    policy = algorithm.policy(seed=c.seed)
    if isinstance(policy, Planner):
        raise UserError(
            f"{exp.algorithm} acts by plans that it keeps, and estimates from data are of policies that act by what "
            "they see alone: evaluate it in the simulator."
        )
    discount = algorithm.needs.discount if c.discount is None else c.discount
    if not 0 <= discount < 1:
        raise UserError(f"{exp.algorithm} has a discount of {discount}: choose one below 1 with --discount.")
    data = catalogue.trajectories(exp.data)
    require_same_spec(algorithm.spec, data.spec)
    with new_folder(output or run.folder / "off-policy", overwrite, OFF_POLICY_FILES) as folder:
        fitted = offpolicy.fitted_q(data, lambda obs: policy.act(obs)[0], c, discount, quiet)
        found = _importance(algorithm, data, discount)
        facts = {
            "what": "estimates from data; no simulator was run",
            "dataset": exp.dataset,
            "episodes": data.num_episodes,
            "discount": discount,
            "data": asdict(summarise(data.return_to_go(discount)[data.offsets[:-1]])),
            "fitted Q": asdict(fitted),
            "importance sampling": found if isinstance(found, str) else asdict(found),
            "settings": config.to_dict(c),
            "checkpoint": run.checkpoint.name,
            "versions": versions(),
        }
        (folder / "estimates.json").write_text(json.dumps(facts, indent=1))
    note_stage(run.folder, "off-policy", time.monotonic() - began)
    return {**facts, "run": str(run.folder)}


def _importance(algorithm: Algorithm, data: Trajectories, discount: float) -> offpolicy.Importance | str:
    """Importance sampling, or why there is none."""
    if not isinstance(algorithm, ActorAlgorithm):
        return "none: the algorithm has no distribution over actions"
    if data.log_prob is None:
        return "none: the dataset keeps no log-probabilities of the policy that collected it"
    ratios = []
    for episode in data.episodes():
        unit = algorithm.spec.to_unit(torch.as_tensor(episode.action))
        with torch.no_grad():
            log_prob = algorithm.pi(episode.obs[:-1]).log_prob(unit.to(algorithm.normaliser.shift)).cpu().numpy()
        ratios.append(log_prob - episode.log_prob)
    return offpolicy.importance(ratios, [episode.reward for episode in data.episodes()], discount)


# Demo ----------------------------------------------------------------------------------------------------------------


def demo(name: str, flags: Mapping[str, str], output: Path | None = None, quiet: bool = False) -> Path:
    """The main job in five steps: collect, train, plan, evaluate, report. Returns the report's path."""
    exp = experiment.load(name, dict(flags))
    recipe = collecting.recipe_of(exp.data)
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
    if exp.algorithm in ("diffuser", "guide"):
        plan(run, count=16, seed=exp.seed + 1)
    print(f"[4/5] evaluate under {exp.protocol}", flush=True)
    data = evaluate(run, quiet=quiet)
    print("[5/5] report", flush=True)
    path = report.write(run)
    print(f"report: {path.resolve()}\n{report.score_line(data)}")
    return path
