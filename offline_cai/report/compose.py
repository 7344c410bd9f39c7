"""The report: what runs have in common first, then what is to be seen of each."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from offline_cai.errors import Notice, UserError
from offline_cai.evaluation import plots
from offline_cai.files import write_text
from offline_cai.report import page, scores, sections
from offline_cai.report.runs import Run, attempt, groups, read
from offline_cai.training import trackers


def write(*folders: Path, output: Path | None = None, overwrite: bool = False) -> Path:
    """Write a page about runs, by default into the first one's folder as report.html; returns its path.

    Of runs that differ in nothing but the seed, scores and curves are of all, pictures of the first. What is damaged,
    unfinished or no run at all is a sentence on the page and a Notice; the rest is written.

    Raises:
        UserError: none of the folders is a run's, or there is a report that may not be overwritten.
    """
    notes: list[str] = []
    runs, refused = _read(folders, notes)
    if not runs:
        raise refused[0]
    runs = [run for run in runs if run.rows or run.results] or runs[:1]
    path = output or runs[0].folder / "report.html"
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already and is not overwritten: pass --overwrite, or name another file.")
    by_label = groups(runs)
    parts = [_together(by_label, notes)]
    for label, some in by_label.items():
        parts += _alone(label, some, len(by_label) > 1, notes)
    for note in notes:
        warnings.warn(note, Notice, stacklevel=2)
    title = runs[0].settings["name"] if len(by_label) == 1 else f"{len(runs)} runs"
    about = "; ".join(_about(label, some, len(by_label) > 1) for label, some in by_label.items())
    body = [page.heading(1, title), page.paragraph(about), page.notes(notes), *parts]
    write_text(path, page.page(f"{title} · offline_cai", "\n".join(part for part in body if part)))
    return path


def _read(folders: Sequence[Path], notes: list[str]) -> tuple[list[Run], list[UserError]]:
    """The runs, and what is wrong with the folders that are none."""
    runs, refused = [], []
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            runs.append(read(folder, notes))
        except UserError as error:
            refused.append(error)
            notes.append(f"left out: {error}")
    return runs, refused


def _about(label: str, some: Sequence[Run], named: bool) -> str:
    settings, seeds = some[0].settings, ", ".join(str(run.seed) for run in some)
    source = f"trained on {settings['dataset']}" if settings["dataset"] else "trained in its environment"
    return f"{f'{label}: ' if named else ''}{settings['algorithm']} {source}, seed{'s' * (len(some) > 1)} {seeds}"


def _together(by_label: Mapping[str, Sequence[Run]], notes: list[str]) -> str:
    """Scores and curves over all runs."""
    runs = [run for some in by_label.values() for run in some]
    parts = []
    if tables := attempt(notes, "the table of scores is", lambda: scores.tables(by_label)):
        line = ""
        if len(runs) == 1 and runs[0].results is not None:
            line = page.paragraph(scores.score_line(runs[0].results), "score")
        parts.append(f"{page.heading(2, 'Scores')}{line}{tables}")
    parts += [attempt(notes, "the learning curves are", lambda: _learning(by_label)) or ""]
    parts += [attempt(notes, "the metrics are", lambda: _metrics(by_label)) or ""]
    return "\n".join(parts)


def _learning(by_label: Mapping[str, Sequence[Run]]) -> str:
    """Evaluations while training, a picture per protocol."""
    records = [
        {"task": run.settings["protocol"], "label": label, "curve": list(trackers.evaluations(run.rows))}
        for label, some in by_label.items()
        for run in some
    ]
    records = [record for record in records if record["curve"]]
    tasks = dict.fromkeys(record["task"] for record in records)
    drawn = [
        page.picture(plots.png(plots.learning([task], records)), "", alt=f"scores while training, {task}")
        for task in tasks
    ]
    if not drawn:
        return ""
    caption = (
        "Scores of evaluations while training, on starts of their own: the mean over the seeds of each label (their "
        "number in brackets), between the lowest and the highest seed."
    )
    return page.heading(2, "Learning curves") + page.grid(drawn) + page.paragraph(caption)


def _metrics(by_label: Mapping[str, Sequence[Run]]) -> str:
    """Losses and what belongs to them, a picture each."""
    logged = {label: [run.rows for run in some if run.rows] for label, some in by_label.items()}
    every = dict.fromkeys(name for some in logged.values() for rows in some for row in rows for name in row)
    ends = ("loss", "grad_norm", "kl", "temperature", "learning_rate")
    names = [name for end in ends for name in every if name.endswith(end)]
    drawn = []
    for name in names:
        having = {label: [rows for rows in some if any(name in row for row in rows)] for label, some in logged.items()}
        drawn.append(page.picture(plots.png(plots.metric(name, having)), "", alt=f"{name} over optimiser steps"))
    if not drawn:
        return ""
    caption = "From every line of metrics.jsonl; several seeds as their mean, between lowest and highest."
    return page.heading(2, "Training") + page.grid(drawn) + page.paragraph(caption)


def _alone(label: str, some: Sequence[Run], named: bool, notes: list[str]) -> list[str]:
    """What is to be seen of the first of runs that differ in their seed."""
    run = some[0]
    parts = [page.heading(2, label if named else "The run")]
    if len(some) > 1:
        parts.append(page.paragraph(f"What follows is of seed {run.seed}, in {run.folder}."))
    for what, section in sections.ALL.items():
        parts.append(attempt(notes, f"{what} of {run.folder} are", lambda section=section: section(run)) or "")  # type: ignore[misc]
    return parts
