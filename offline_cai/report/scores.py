"""Scores as lines and tables."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from offline_cai.evaluation.statistics import caution, paired, summarise
from offline_cai.report import page
from offline_cai.report.runs import Run

_TASK = ("environment", "kwargs", "wrapper", "options", "score")  # the fields of a protocol that scores depend on
_STARTS = ("seed", "episodes", "environments")


def plus_minus(r: Mapping[str, Any], sign: str = "") -> str:
    """ "152.4 ± 3.1", from a mean and a standard error, which one episode does not have."""
    return f"{r['mean']:{sign}.1f} ± {'?' if r['se'] is None else format(r['se'], '.1f')}"


def score_line(data: Mapping[str, Any]) -> str:
    """The line that `make demo` ends with."""
    shown = [name for name in data["results"] if name != "controller without noise"]
    scores = [f"{name} {plus_minus(data['results'][name])}" for name in shown]
    score = data["protocol"]["score"]
    unit = "D4RL normalised" if isinstance(score, str) else "normalised"
    if score is None:
        unit = "raw returns: no references to normalise with"
    return f"score: {' · '.join(scores)} ({unit}, {data['results'][data['policy']]['n']} episodes)"


def tables(groups: Mapping[str, Sequence[Run]]) -> str:
    """A table for each task that runs were evaluated on."""
    tasks: dict[str, dict[str, list[Run]]] = {}
    for label, runs in groups.items():
        for run in runs:
            if run.results is not None:
                task = json.dumps([run.results["protocol"][name] for name in _TASK])
                tasks.setdefault(task, {}).setdefault(label, []).append(run)
    return "\n".join(_table(labels) for labels in tasks.values())


def _table(labels: Mapping[str, Sequence[Run]]) -> str:
    """One task: a row for each run, one above for runs that differ in their seed, and the references."""
    evaluated = [(run, run.results) for runs in labels.values() for run in runs if run.results is not None]
    _, first = evaluated[0]
    protocol, rows, over, counts, names = first["protocol"], list[list[str]](), list[int](), list[int](), list[str]()
    for label, runs in labels.items():
        of_label = [(run, data) for run, data in evaluated if run in runs]
        if len(of_label) > 1:
            over.append(len(rows))
            rows.append(_over_seeds(label, [data["results"][data["policy"]] for _, data in of_label]))
            counts.append(len(of_label))
        for run, data in of_label:
            name = f"{label}, seed {run.seed}" if len(labels) > 1 or len(runs) > 1 else data["policy"]
            names.append(name)
            rows.append(_row(name, data["results"][data["policy"]], data, first))
    shown = set()
    for _, data in evaluated:
        for name, result in data["results"].items():
            who = (name, *(data["protocol"][part] for part in _STARTS))
            if name != data["policy"] and who not in shown:
                shown.add(who)
                rows.append(_row(name, result, data, first))
    head = ["policy", "n", "mean ± SE", "interquartile mean [95 %]", "worst", "raw return", f"{names[0]} − it, paired"]
    parts = [page.heading(3, protocol["name"]), page.table(head, rows, "scores", over)]
    return "\n".join([*parts, page.paragraph(_legend(evaluated, counts))])


def _over_seeds(label: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The mean scores of runs, one score each."""
    means = np.array([r["mean"] for r in results])
    episodes = "/".join(str(n) for n in sorted({r["n"] for r in results}))
    count, returns = f"{len(means)} × {episodes}", [np.mean(r["returns"]) for r in results]
    return [f"{label}, {len(means)} seeds", count, *_numbers(asdict(summarise(means)), means, returns), ""]


def _row(name: str, r: Mapping[str, Any], data: Mapping[str, Any], first: Mapping[str, Any]) -> list[str]:
    """A policy, with its difference to the first one where they met the same starts."""
    ours, compared = first["results"][first["policy"]], ""
    if r is not ours and all(data["protocol"][part] == first["protocol"][part] for part in _STARTS):
        compared = plus_minus(asdict(paired(np.array(_scores(ours)), np.array(_scores(r)))), "+")
    return [name, str(r["n"]), *_numbers(r, _scores(r), r["returns"]), compared]


def _numbers(r: Mapping[str, Any], scores: np.ndarray, returns: Sequence[float]) -> list[str]:
    interval = f"{r['iqm']:.1f} [{r['low']:.1f}, {r['high']:.1f}]"
    return [plus_minus(r), interval, f"{scores.min():.1f}", f"{np.mean(returns):.1f}"]


def _scores(r: Mapping[str, Any]) -> np.ndarray:
    return np.array(r["normalised"] or r["returns"])


def _legend(evaluated: Sequence[tuple[Run, Mapping[str, Any]]], counts: Sequence[int]) -> str:
    protocol = evaluated[0][1]["protocol"]
    score, starts = protocol["score"], sorted({data["protocol"]["seed"] for _, data in evaluated})
    unit = "Scores are raw returns: there are no references to normalise them with."
    if isinstance(score, str):
        unit = f"Scores are D4RL normalised ({score}: 0 is its random, 100 its expert reference, no ceiling)."
    elif score is not None:
        unit = f"Scores are normalised: 0 and 100 are returns of {score[0]:g} and {score[1]:g}."
    fewest = min(data["results"][data["policy"]]["n"] for _, data in evaluated)
    seeds = "Rows of several seeds are of one mean score for each seed. " + caution(min(counts)) if counts else ""
    repeated = sum(len(r.get("repeated", [])) for _, data in evaluated for r in data["results"].values())
    cut = sum(len(r.get("cut", [])) for _, data in evaluated for r in data["results"].values())
    care = f"{repeated} episodes were repeated after a fault, {cut} cut for their time." if repeated or cut else ""
    return (
        f"{unit} {protocol['environment']}, {json.dumps(protocol['kwargs'])}, {json.dumps(protocol['options'])}, "
        f"starts of seed {', '.join(map(str, starts))}; n counts episodes. Policies meet the same starts, and "
        f"the last column compares start by start. {evaluated[0][1].get('mismatch') or ''} {care} {seeds} "
        f"{caution(fewest) if caution(fewest) not in seeds else ''}"
    )
