"""What `offline-cai evaluate` does: a run in the simulator beside references, or an estimate from its dataset alone.

Each command gives plain facts, and a function beside it shows them to people.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offline_cai import collect as collecting
from offline_cai import config, report
from offline_cai.algorithms.diffuser import Diffuser
from offline_cai.commands import diffuser_of, new_folder, note_stage, open_run
from offline_cai.core import Algorithm, Episode, Policy
from offline_cai.data import catalogue
from offline_cai.data.trajectories import Trajectories
from offline_cai.environments.make import env_spec
from offline_cai.environments.maze2d import Maze
from offline_cai.errors import Interrupted, UserError
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.evaluation import offpolicy, plots, references
from offline_cai.evaluation.statistics import caution, paired, summarise
from offline_cai.planning.config import PlannerConfig
from offline_cai.planning.planner import Planner
from offline_cai.policies.acting import ActorAlgorithm
from offline_cai.provenance import versions
from offline_cai.spaces import require_same_spec

EVALUATION_FILES = {"results.json", "paths.npz", "paths.png", "choices.png", "routes.png", "episodes.npz"}
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
    manifest = (run.checkpoint / "manifest.json").read_text()
    with new_folder(output or run.folder / "evaluation", overwrite, EVALUATION_FILES) as folder:
        policy = algorithm.policy(seed=protocol.seed)
        label = "planner" if isinstance(policy, Planner) else exp.algorithm
        policies: dict[str, Callable[[], Policy]] = {label: lambda: policy}
        diffuser = diffuser_of(algorithm)
        how = PlannerConfig() if diffuser is None else diffuser.config.planner
        policies |= reference_policies(protocol, exp.dataset, how, algorithm.needs.stride)
        kept = run.folder / ".evaluation" / _key(manifest, diffuser, protocol, policies)
        try:
            results = evaluation.evaluate(protocol, policies, algorithm.spec, quiet, keep=kept)
        except KeyboardInterrupt:
            done = len(list(kept.glob("*.npz")))
            again = "the same command goes on after them."
            raise Interrupted(f"{done} of {len(policies)} policies are evaluated and kept: {again}") from None
        data = {
            **_data(protocol, label, results),
            "planner": _explain(results[label].account, diffuser),
            "guidance": _guided(results[label].account, diffuser),
            "checkpoint": run.checkpoint.name,
        }
        _write(folder, data, protocol, results)
    shutil.rmtree(kept.parent, ignore_errors=True)
    note_stage(run.folder, "evaluate", time.monotonic() - began)
    return {**data, "run": str(run.folder)}


def reference(path: Path) -> str | None:
    """The reference that a user means by what may be a run's folder: a name, or an actor's file; None: neither."""
    if references.is_one(str(path)) and not path.exists():
        return str(path)
    return f"actor:{path}" if path.suffix == ".npz" else None


def evaluate_reference(
    who: str,
    name: str | None = None,
    flags: Mapping[str, str] | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Evaluate a policy that needs no run, such as "random" or "actor:hopper-medium", under a protocol.

    It is alone, unless `flags` name references. Writes EVALUATION_FILES and returns what results.json holds.
    """
    if name is None:
        raise UserError(f"{who!r} is of no run that names a protocol: choose one with --protocol, of eval/.")
    protocol = evaluation.protocol(name, {"references": "[]", **(flags or {})}).on(None)
    target = output or Path("runs") / "references" / protocol.name / re.sub(r"[^\w.]+", "-", who)
    with new_folder(target, overwrite, EVALUATION_FILES) as folder:
        all_of_them = replace(protocol, references=(who, *protocol.references))
        policies = reference_policies(all_of_them, None, PlannerConfig(execute="pursue"), 1)
        env = protocol.make()
        spec = env_spec(env)
        env.close()
        results = evaluation.evaluate(protocol, policies, spec, quiet)
        data = {**_data(protocol, who, results), "planner": {}}
        _write(folder, data, protocol, results)
    return {**data, "written to": str(target)}


def _data(protocol: evaluation.Protocol, label: str, results: Mapping[str, evaluation.Result]) -> dict[str, Any]:
    """What results.json holds of any policy."""
    ours = results[label].scores
    return {
        "protocol": config.to_dict(protocol),
        "mismatch": protocol.mismatch,
        "policy": label,
        "results": {name: result.to_json() for name, result in results.items()},
        "paired": {name: asdict(paired(ours, result.scores)) for name, result in results.items() if name != label},
        "versions": versions(),
    }


def _write(
    folder: Path,
    data: Mapping[str, Any],
    protocol: evaluation.Protocol,
    results: Mapping[str, evaluation.Result],
) -> None:
    """Write EVALUATION_FILES."""
    ours = results[data["policy"]]
    (folder / "results.json").write_text(json.dumps(data, indent=1))
    paths = {name: np.stack([e.obs for e in result.episodes]) for name, result in results.items() if _even(result)}
    arrays: dict[str, Any] = {name: path.astype(np.float32) for name, path in paths.items()}
    np.savez_compressed(folder / "paths.npz", **arrays)
    _keep_episodes(folder / "episodes.npz", ours.episodes, protocol)
    _draw_paths(folder / "paths.png", protocol, results)
    if ours.account.get("first"):
        _draw_choices(folder, protocol, ours)


def text(data: Mapping[str, Any]) -> str:
    """What `evaluate` returns, as lines: each policy's scores, beside the run's own, and the score."""
    lines = []
    for name, r in data["results"].items():
        difference = data["paired"].get(name)
        beside = f"   paired {report.plus_minus(difference, '+')}" if difference else ""
        interval = f"[{r['low']:.1f}, {r['high']:.1f}]"
        lines.append(f"{name:26} {report.plus_minus(r):>14}   IQM {r['iqm']:.1f} {interval}{beside}")
    if word := caution(data["results"][data["policy"]]["n"]):
        lines.append(word)
    return "\n".join([*lines, report.score_line(data)])


def _key(manifest: str, diffuser: Diffuser | None, protocol: evaluation.Protocol, policies: Mapping[str, Any]) -> str:
    """A hash of what is evaluated: the weights and settings, the protocol, and who is run."""
    planner = None if diffuser is None else config.to_dict(diffuser.config.planner)
    facts = [manifest, config.to_dict(protocol), planner, list(policies)]
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


def _draw_choices(folder: Path, protocol: evaluation.Protocol, result: evaluation.Result) -> None:
    """The candidates of the first plans and what was executed, and their routes, where the environment is a maze."""
    env = protocol.make()
    if hasattr(env.unwrapped, "maze"):
        spec, maze, first = env_spec(env), Maze.of(env), result.account["first"]
        begun = result.episodes[:: protocol.episodes // protocol.environments]
        panels = [
            plots.Choice(
                rows=np.array(rows),
                weight=np.array(weight),
                reason=np.array(reason),
                walked=e.obs[:, spec.columns("achieved_goal")],
                goal=e.obs[0, spec.columns("desired_goal")],
            )
            for rows, weight, reason, e in zip(first["rows"], first["weight"], first["reason"], begun, strict=False)
        ]
        (folder / "choices.png").write_bytes(plots.png(plots.choices(maze, first["names"], panels)))
        (folder / "routes.png").write_bytes(plots.png(plots.routes(maze, panels)))
    env.close()


def _even(result: evaluation.Result) -> bool:
    return len({len(episode.obs) for episode in result.episodes}) == 1


def reference_policies(
    protocol: evaluation.Protocol, dataset: str | None, planner: PlannerConfig, stride: int
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
        planner=planner,
        stride=stride,
        seed=protocol.seed,
    )
    env.close()
    found = {name: references.find(name) for name in protocol.references}
    return {name: lambda make=make: make(setting) for name, make in found.items()}  # type: ignore[misc]


def _explain(account: Mapping[str, Any], diffuser: Diffuser | None) -> dict[str, Any]:
    if diffuser is None:
        return {}
    c = diffuser.config
    rows = c.planner.rows or c.rows
    facts = {**config.to_dict(c.planner), "rows": rows, "stride": c.stride}
    if not c.segments:
        facts["horizon in steps"] = rows * c.stride
    if not account["plans"]:
        return facts
    facts |= {"plans": account["plans"], "milliseconds per plan": 1000 * account["seconds"] / account["plans"]}
    total, steps = account["deviation"]
    if steps:
        facts["deviation from the plan, mean"] = total / steps
    if feasible := account["feasible"]:
        facts |= {
            "feasible candidates, share": float(np.mean(feasible)),
            "plans without a feasible candidate": sum(share == 0 for share in feasible),
        }
    rejected = sum(account["rejected"].values())
    return facts | {f"rejected for {name}, share": n / rejected for name, n in account["rejected"].items()}


def _guided(account: Mapping[str, Any], diffuser: Diffuser | None) -> dict[str, Any]:
    """How the plans that were executed were steered, and what their weights say; empty where nothing was."""
    if diffuser is None:
        return {}
    guide, effective, evidence = diffuser.config.planner.guide, account["effective"], account["log_evidence"]
    if not account["plans"] or (guide == "none" and not effective):
        return {}
    facts: dict[str, Any] = {"guide": guide, "temperature": account["temperature"], "plans": account["plans"]}
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

    Fitted Q evaluation is of the policy as it acts, importance sampling of the distribution that it acts by, where that
    has a density and the dataset keeps log-probabilities. `flags` set fields of `OffPolicy`.

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
        found = _importance(algorithm, data, discount)
        fitted = offpolicy.fitted_q(data, lambda obs: policy.act(obs)[0], c, discount, quiet)
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


def off_policy_text(facts: Mapping[str, Any]) -> str:
    """What `off_policy` returns, as lines: one for each estimate."""
    found = facts["importance sampling"]
    lines = [
        f"estimates of the return with discount {facts['discount']}, from {facts['episodes']} episodes, no simulator:",
        f"the data themselves   {report.plus_minus(facts['data'])}",
        f"fitted Q evaluation   {report.plus_minus(facts['fitted Q'])} (over first states alone)",
    ]
    if isinstance(found, str):
        return "\n".join([*lines, f"importance sampling   {found}"])
    for name in ("episodes", "decisions"):
        e = found[name]
        interval = f"[{e['low']:.1f}, {e['high']:.1f}]"
        lines.append(f"importance sampling   {e['value']:.1f} {interval}, of its samples, weighed by {name}")
    rests = "too few for it to mean anything" if found["effective"] < 10 else "of its weights by episode"
    return "\n".join([*lines, f"effective sample size {found['effective']:.1f} of {found['n']} episodes: {rests}."])


def _importance(algorithm: Algorithm, data: Trajectories, discount: float) -> offpolicy.Importance | str:
    """Importance sampling, or why there is none."""
    if not isinstance(algorithm, ActorAlgorithm):
        return "none: the algorithm has no distribution over actions"
    if data.log_prob is None:
        return "none: the dataset keeps no log-probabilities of the policy that collected it"
    if algorithm.no_density is not None:
        return f"none: {algorithm.no_density}"
    ratios = []
    for episode in data.episodes():
        unit = algorithm.spec.to_unit(torch.as_tensor(episode.action))
        with torch.no_grad():
            log_prob = algorithm.pi(episode.obs[:-1]).log_prob(unit.to(algorithm.normaliser.shift)).cpu().numpy()
        ratios.append(log_prob - episode.log_prob)
    return offpolicy.importance(ratios, [episode.reward for episode in data.episodes()], discount)
