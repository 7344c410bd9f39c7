"""The scoreboard's table and pictures, from the records of its cells."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from offline_cai.evaluation import plots

Record = Mapping[str, Any]


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
    lines += ["", _legend(done, bool(raw))]
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


def _legend(done: Sequence[Record], raw: bool) -> str:
    seeds = sorted({r["seed"] for r in done if r["seed"] is not None})
    starts = sorted({r["protocol"]["seed"] for r in done if "seed" in r["protocol"]})
    text = "D4RL normalised scores" + (", raw returns where it says so" if raw else "")
    return (
        f"{text}: mean over training seeds ± its standard error (seeds × episodes each). † one seed: ± is over its "
        "episodes, and says nothing about other seeds; so it is for what is not trained. Two or three seeds make a "
        f"rough error. Training seeds: {', '.join(map(str, seeds)) or 'none'}; evaluation seed: "
        f"{', '.join(map(str, starts)) or 'none'}, the same starts for all. CPU minutes: of all runs in the row."
    )


def pictures(tasks: Sequence[str], records: Sequence[Record]) -> dict[str, bytes]:
    """scores.png, and curves.png if there were evaluations while training."""
    done = [r for r in records if not r["error"]]
    found = {"scores.png": plots.png(plots.scores(tasks, done))} if done else {}
    curves = [r for r in done if r.get("curve")]
    if curves:
        names = [task for task in tasks if any(r["task"] == task for r in curves)]
        found["curves.png"] = plots.png(plots.learning(names, curves))
    return found
