"""The scoreboard's table and pictures, from the records of its cells."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offline_cai import config
from offline_cai.data import scores
from offline_cai.errors import UserError
from offline_cai.evaluation import plots, statistics

Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Cell:
    cell: str
    kind: str
    label: str
    task: str
    seed: int | None
    error: str | None


@dataclass(frozen=True)
class _Result:
    n: int
    mean: float
    se: float | None
    curve: tuple[dict[str, float], ...] = ()

    def __post_init__(self) -> None:
        if any(not {"step", "score", "return"} <= row.keys() for row in self.curve):
            raise UserError("a row of its curve lacks step, score or return.")


@dataclass(frozen=True)
class _Protocol:
    environment: str
    score: tuple[float, float] | str | None
    seed: int | None = None


@dataclass(frozen=True)
class _Minutes:
    train: float
    evaluate: float


def check(record: Any, where: str) -> None:
    """Look whether a record, read from the file `where`, holds what is shown of it.

    Raises:
        UserError: something is missing or of another type.
    """
    if not config.part(_Cell, record, where).error:
        config.part(_Result, record, where)
        config.part(_Protocol, record.get("protocol"), f"{where}: protocol")
        config.part(_Minutes, record.get("cpu_minutes"), f"{where}: cpu_minutes")


def line(record: Record) -> str:
    """A cell in short: "72.3 ± 1.7 (100 episodes; 0.6 + 0.1 CPU minutes)", of training and evaluation; or its error."""
    if record["error"]:
        return f"failed: {record['error']}"
    minutes, spread = record["cpu_minutes"], "?" if record["se"] is None else f"{record['se']:.1f}"
    unit = ", raw return" if record["protocol"]["score"] is None else ""
    spent = f"{minutes['train']:.1f} + {minutes['evaluate']:.1f} CPU minutes"
    return f"{record['mean']:.1f} ± {spread}{unit} ({record['n']} episodes; {spent})"


def table(tasks: Collection[str], labels: Sequence[str], records: Sequence[Record]) -> str:
    """Markdown: a row per label, a column per task, and what stands in a cell below it."""
    done = [r for r in records if not r["error"]]
    raw = {r["task"] for r in done if r["protocol"]["score"] is None}
    heads = [f"{task} (return)" if task in raw else task for task in tasks]
    lines = ["| | " + " | ".join(heads) + " | CPU minutes |", "|---" * (len(heads) + 2) + "|"]
    for label in labels:
        own = [r for r in records if r["label"] == label]
        columns = [_entry([r for r in own if r["task"] == task]) for task in tasks]
        spent = sum(sum(r["cpu_minutes"].values()) for r in own if not r["error"])
        lines.append(f"| {label} | " + " | ".join(columns) + f" | {spent:.1f} |")
    lines += ["", _legend(done, bool(raw)), *_over_tasks(tasks, labels, done)]
    lines += ["", *(f"- {r['cell']} failed: {r['error']}" for r in records if r["error"])]
    return "\n".join(lines).rstrip() + "\n"


def _entry(records: Sequence[Record]) -> str:
    """Mean over seeds ± its standard error; with one seed that over its episodes, marked."""
    done, failed = [r for r in records if not r["error"]], sum(bool(r["error"]) for r in records)
    note = f"{failed} failed" if failed else ""
    if not done:
        return note or "–"
    means = np.array([r["mean"] for r in done])
    count = "/".join(str(n) for n in sorted({r["n"] for r in done}))
    if done[0]["seed"] is None or len(done) == 1:
        se, mark = done[0]["se"], "" if done[0]["seed"] is None else "†"
        runs = count if done[0]["seed"] is None else f"1 × {count}"
    else:
        se, mark, runs = means.std(ddof=1) / np.sqrt(len(means)), "", f"{len(means)} × {count}"
    spread = "?" if se is None else f"{se:.1f}"
    return f"{means.mean():.1f} ± {spread}{mark} ({runs})" + (f", {note}" if note else "")


def shared(tasks: Collection[str], labels: Sequence[str], done: Sequence[Record]) -> dict[str, dict[str, np.ndarray]]:
    """By trained label and task the mean scores of its seeds, on the normalised tasks that all these labels have."""
    trained = [r for r in done if r["kind"] == "trained" and r["protocol"]["score"] is not None]
    names = [label for label in labels if any(r["label"] == label for r in trained)]
    found = {
        label: {t: np.array([r["mean"] for r in trained if (r["label"], r["task"]) == (label, t)]) for t in tasks}
        for label in names
    }
    common = [task for task in tasks if found and all(len(own[task]) for own in found.values())]
    return {label: {task: own[task] for task in common} for label, own in found.items()}


def _over_tasks(tasks: Collection[str], labels: Sequence[str], done: Sequence[Record]) -> list[str]:
    """What is trained, over the tasks that all of it has; nothing where that is fewer than two labels or tasks."""
    strata = shared(tasks, labels, done)
    common = list(next(iter(strata.values()), {}))
    if len(strata) < 2 or len(common) < 2:
        return []
    first = next(iter(strata))
    lines = [
        f"Over {', '.join(common)}:",
        "",
        f"| | IQM [95 %] | P(better than {first}) [95 %] | runs |",
        "|---|---|---|---|",
    ]
    for label, own in strata.items():
        iqm = statistics.interquartile_mean(list(own.values()))
        better = statistics.probability_of_improvement(list(own.values()), list(strata[first].values()))
        middle, beside = f"{iqm.value:.1f}", "" if label == first else f"{better.value:.2f}"
        if _several(own):
            middle += f" [{iqm.low:.1f}, {iqm.high:.1f}]"
        if label != first and (_several(own) or _several(strata[first])):
            beside += f" [{better.low:.2f}, {better.high:.2f}]"
        lines.append(f"| {label} | {middle} | {beside} | {iqm.n} |")
    fewest = min(len(seeds) for own in strata.values() for seeds in own.values())
    lines += ["", f"One score per run; bootstrapped over the seeds of each task. {_few_seeds(fewest)}".rstrip()]
    return ["", *lines]


def _several(own: Mapping[str, np.ndarray]) -> bool:
    """Whether there is anything to resample: two seeds on some task."""
    return any(len(seeds) > 1 for seeds in own.values())


def _few_seeds(fewest: int) -> str:
    """What an interval over tasks is worth; measured in `tests/evaluation/test_statistics.py`."""
    if fewest == 1:
        return "A task with one seed adds nothing to a width: these are too narrow, and with one on all there is none."
    worth = {2: 70, 3: 85, 4: 88, 5: 90}.get(fewest)
    if worth is None:
        return ""
    return f"With {fewest} seeds a task, intervals that say 95 % hold the truth about {worth} % of the time."


def _legend(done: Sequence[Record], raw: bool) -> str:
    seeds = sorted({r["seed"] for r in done if r["seed"] is not None})
    starts = sorted({r["protocol"]["seed"] for r in done if "seed" in r["protocol"]})
    text = "Normalised scores" + (", raw returns where it says so" if raw else "")
    warned = {scores.mismatch(r["protocol"]["score"], r["protocol"]["environment"]) for r in done}
    return (
        f"{text}: mean over training seeds ± its standard error (seeds × episodes each). † one seed: ± is over its "
        "episodes, and says nothing about other seeds; so it is for what is not trained. Two or three seeds make a "
        f"rough error. Training seeds: {', '.join(map(str, seeds)) or 'none'}; evaluation seed: "
        f"{', '.join(map(str, starts)) or 'none'}, the same starts for all. CPU minutes: of all runs in the row."
        + "".join(f" {warning}" for warning in sorted(filter(None, warned)))
    )


def pictures(tasks: Sequence[str], records: Sequence[Record]) -> dict[str, bytes]:
    """scores.png; curves.png if there were evaluations while training; profile.png over several tasks.

    Tasks that nothing was trained on are left out.
    """
    done, found = [r for r in records if not r["error"]], {}
    if names := _having(tasks, [r for r in done if r["kind"] == "trained"]):
        found["scores.png"] = plots.png(plots.scores(names, done))
    curves = [r for r in done if r.get("curve")]
    if names := _having(tasks, curves):
        found["curves.png"] = plots.png(plots.learning(names, curves))
    strata = shared(tasks, list(dict.fromkeys(r["label"] for r in done)), done)
    if len(strata) > 1 and len(next(iter(strata.values()))) > 1:
        found["profile.png"] = plots.png(plots.profile({k: list(v.values()) for k, v in strata.items()}))
    return found


def _having(tasks: Sequence[str], records: Sequence[Record]) -> list[str]:
    return [task for task in tasks if any(r["task"] == task for r in records)]
