"""One self-contained HTML page about a run: what was trained, what it plans, what it scores, and how it was made."""

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from offline_cai import config
from offline_cai.errors import UserError
from offline_cai.evaluation import plots
from offline_cai.evaluation.statistics import caution
from offline_cai.files import read_json, write_text
from offline_cai.training import trackers

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1f2430; max-width: 62rem; margin: 2.5rem auto;
padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.4rem; }
p.score { font-size: 1.05rem; background: #faf5f0; border-left: 4px solid #c2410c; padding: .6rem .9rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: .3rem .9rem .3rem 0;
text-align: left; border-bottom: 1px solid #e7e5e4; vertical-align: top; } th { font-weight: 600; }
td.n { text-align: right; } img { max-width: 100%; } figure { margin: 1rem 0; } figcaption, .note { color: #57534e;
font-size: .88rem; } pre { background: #f5f5f4; padding: .9rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; } .side > * { flex: 1 1 20rem; }
"""


def write(run: Path, overwrite: bool = False) -> Path:
    """Write RUN/report.html from what the run's folder holds; parts that were not made are left out.

    Raises:
        UserError: the folder is no run's, or there is a report that may not be overwritten.
    """
    path = run / "report.html"
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} holds no config.yaml: name the folder that `offline-cai train` made.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already and is not overwritten: pass --overwrite.")
    exp = config.read(run / "config.yaml")
    missing = [key for key in ("name", "algorithm", "dataset", "seed") if key not in exp]
    if missing:
        raise UserError(f"{run / 'config.yaml'} has no {missing[0]!r}: it is damaged.")
    parts = [_scores(run), _plans(run), _curves(run), _stages(run), _config(run)]
    body = "\n".join(part for part in parts if part)
    title = html.escape(f"{exp['name']} · offline_cai")
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{html.escape(exp['name'])}</h1>\n<p class=note>{html.escape(exp['algorithm'])} trained on "
        f"{html.escape(exp['dataset'])}, seed {exp['seed']}</p>\n{body}\n</body></html>\n",
    )
    return path


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


def _json(path: Path, *keys: str) -> Any:
    return read_json(path, *keys) if path.is_file() else None


def _image(data: bytes, caption: str, kind: str = "png") -> str:
    encoded = base64.b64encode(data).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/{kind};base64,{encoded}"><figcaption>{text}</figcaption></figure>'
    )


def _table(rows: list[list[str]], head: list[str]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = []
    for row in rows:
        first, rest = html.escape(row[0]), "".join(f"<td class=n>{html.escape(cell)}</td>" for cell in row[1:])
        lines.append(f"<tr><td>{first}</td>{rest}</tr>")
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def _pairs(data: Mapping[str, Any]) -> str:
    return _table([[name, _text(value)] for name, value in config.flatten(data)], ["", ""])


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scores(run: Path) -> str:
    data = _json(run / "evaluation" / "results.json", "results", "paired", "protocol", "policy", "planner")
    if data is None:
        return ""
    rows = []
    for name, r in data["results"].items():
        paired = data["paired"].get(name)
        rows.append(
            [
                name,
                plus_minus(r),
                f"{r['iqm']:.1f} [{r['low']:.1f}, {r['high']:.1f}]",
                f"{min(r['normalised'] or r['returns']):.1f}",
                f"{np.mean(r['returns']):.1f}",
                plus_minus(paired, "+") if paired else "",
            ]
        )
    head = ["policy", "mean ± SE", "interquartile mean [95 %]", "worst", "raw return", f"{data['policy']} − it, paired"]
    protocol = data["protocol"]
    score = protocol["score"]
    unit = "Scores are raw returns: there are no references to normalise them with."
    if isinstance(score, str):
        unit = f"Scores are D4RL normalised ({score}: 0 is its random, 100 its expert reference, no ceiling)."
    elif score is not None:
        unit = f"Scores are normalised: 0 and 100 are returns of {score[0]:g} and {score[1]:g}."
    note = (
        f"{unit} {protocol['episodes']} episodes in {protocol['environment']}, {json.dumps(protocol['kwargs'])}, "
        f"{json.dumps(protocol['options'])}, seed {protocol['seed']}; every policy starts from the same states, so the "
        "last column compares start by start. "
        f"{data.get('mismatch') or ''} {caution(protocol['episodes'])}"
    )
    parts = [f"<h2>Score</h2><p class=score>{html.escape(score_line(data))}</p>", _table(rows, head)]
    parts.append(f"<p class=note>{html.escape(note)}</p>")
    picture = run / "evaluation" / "paths.png"
    if picture.is_file():
        caption = "Paths executed in the simulator; dots are starts, the star is the goal."
        parts.append(_image(picture.read_bytes(), caption))
    if data["planner"]:
        parts.append(f"<h2>Planner</h2>{_pairs(data['planner'])}")
    return "\n".join(parts)


def _plans(run: Path) -> str:
    folder = run / "plans"
    facts = _json(folder / "plans.json")
    if facts is None or not all((folder / name).is_file() for name in ("plans.png", "denoising.gif")):
        return ""
    picture = _image(
        (folder / "plans.png").read_bytes(),
        "Plans for new starts (dot) and goals (star): planned rows and the path that the tracker follows through them.",
    )
    movie = _image(
        (folder / "denoising.gif").read_bytes(),
        "The denoising of the first of these plans, in more steps than planning takes and slowed down for the eye.",
        "gif",
    )
    return f"<h2>Plans</h2>{picture}<div class=side>{movie}<div>{_pairs(facts)}</div></div>"


def _curves(run: Path) -> str:
    rows = trackers.read(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    names = [name for name in ("loss", "grad_norm", "learning_rate", "score") if any(name in row for row in rows)]
    if not names:
        return ""
    caption = f"Every line of metrics.jsonl: {rows[-1]['step']} steps in {rows[-1]['seconds']:.0f} seconds."
    return f"<h2>Learning curves</h2>{_image(plots.png(plots.curves(rows, names)), caption)}"


def _stages(run: Path) -> str:
    stages = _json(run / "stages.json")
    if not stages:
        return ""
    order = ["collect", "train", "plan", "evaluate", "off-policy"]
    rows = [[name, f"{stages[name]:.1f} s"] for name in sorted(stages, key=order.index)]
    return f"<h2>Time</h2>{_table([*rows, ['together', f'{sum(stages.values()):.1f} s']], ['stage', 'wall time'])}"


def _config(run: Path) -> str:
    versions = _json(run / "versions.json") or {}
    text = html.escape((run / "config.yaml").read_text())
    return f"<h2>Configuration</h2><pre>{text}</pre><h2>Versions</h2>{_pairs(versions)}"
