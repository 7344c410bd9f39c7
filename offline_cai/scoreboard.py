"""The scoreboard: algorithms on tasks over seeds, trained and evaluated cell by cell, one JSON file for each.

A cell is made if its file is there and carries the fingerprint of what the recipe asks for now. Everything else is made
when the same command runs again; several such processes share the cells that are left.
"""

import fcntl
import hashlib
import json
import re
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

from offline_cai import commands, config, evaluation_commands
from offline_cai.data import catalogue, scores
from offline_cai.environments.make import env_spec
from offline_cai.errors import Interrupted, Notice, UserError
from offline_cai.evaluation import board
from offline_cai.evaluation import evaluate as evaluation
from offline_cai.evaluation.statistics import summarise
from offline_cai.files import read_json, write_bytes, write_text
from offline_cai.planning.config import PlannerConfig
from offline_cai.provenance import versions
from offline_cai.training import experiment, trackers

Kind = Literal["trained", "reference", "dataset"]
DATASET = "dataset"
"""The label of the row with the datasets' own returns."""


@dataclass(frozen=True)
class Task:
    """A column of the table."""

    protocol: str
    """How policies are evaluated: a recipe in eval/."""
    dataset: str | None = None
    """What algorithms are trained on; null: what their configs say."""
    episodes: int | None = None
    """Episodes of an evaluation; null: as many as the protocol says."""
    references: tuple[str, ...] = ("random",)
    """Policies that are not trained, each in a row of its own."""
    own_score: bool = True
    """Whether the dataset's returns are shown: they have to be of the protocol's episodes and rewards."""

    def __post_init__(self) -> None:
        evaluation.protocol(self.protocol, self.flags)

    @property
    def flags(self) -> dict[str, str]:
        return {} if self.episodes is None else {"episodes": str(self.episodes)}


@dataclass(frozen=True)
class Entry:
    """A config on some of the tasks. Entries of one label share a row of the table."""

    label: str
    """The row."""
    config: str
    """An experiment: a recipe in configs/."""
    tasks: tuple[str, ...]
    """The columns."""
    flags: dict[str, Any] = field(default_factory=dict)
    """Fields of the config to set, such as training.steps: 1000."""
    evaluate: dict[str, Any] = field(default_factory=dict)
    """Fields of the protocol or the planner to set for the evaluation, such as planner.steps: 4."""
    seeds: tuple[int, ...] | None = None
    """Seeds of training; null: those of the scoreboard."""


@dataclass(frozen=True)
class Scoreboard:
    """What is trained and evaluated: a recipe in eval/scoreboards/."""

    name: str
    """Name of the scoreboard."""
    tasks: dict[str, Task]
    """The columns of the table."""
    entries: tuple[Entry, ...]
    """What is trained."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training."""

    def __post_init__(self) -> None:
        for entry in self.entries:
            unknown = [name for name in entry.tasks if name not in self.tasks]
            if unknown:
                raise UserError(f"the entry {entry.label!r} names the task {unknown[0]!r}, which is not among tasks.")


class Cell(NamedTuple):
    """One result: an algorithm on a task with a seed, or a policy or dataset that is not trained."""

    kind: Kind
    label: str
    task: str
    seed: int | None
    commands: tuple[str, ...]  # that make it alone
    fingerprint: str  # of what the recipe, its configs and its protocols say of it
    run: Path  # the folder of its training, which cells that differ in their evaluation alone share
    entry: Entry | None = None

    @property
    def name(self) -> str:
        return "/".join(str(part) for part in (self.label, self.task, self.seed) if part is not None)

    @property
    def file(self) -> str:
        return f"{_slug(self.name)}.json"


def load(name: str) -> Scoreboard:
    """A scoreboard from its name or path."""
    path = config.find(name, "eval/scoreboards")
    return config.build(Scoreboard, config.read(path), str(path))


def cells(recipe: Scoreboard, source: str, runs: Path) -> list[Cell]:
    """All cells of a recipe that was loaded from `source`: first what is not trained, which takes least time.

    Raises:
        UserError: a config or protocol does not exist or has a mistake, or two cells have the same name.
    """
    found = [cell for name in recipe.tasks for cell in _untrained(recipe, source, name, runs)]
    for entry in recipe.entries:
        for seed in entry.seeds if entry.seeds is not None else recipe.seeds:
            found += [_trained(recipe, entry, name, seed, runs) for name in entry.tasks]
    names = [cell.file for cell in found]
    for cell in found:
        if names.count(cell.file) > 1:
            raise UserError(f"the scoreboard has two cells {cell.name!r}: give the entries other labels.")
    return found


def _untrained(recipe: Scoreboard, source: str, name: str, runs: Path) -> Iterator[Cell]:
    task = recipe.tasks[name]
    labels: list[tuple[Kind, str]] = [("reference", label) for label in task.references]
    if task.dataset is not None and task.own_score:
        labels.append(("dataset", DATASET))
    for kind, label in labels:
        fingerprint = _fingerprint([label, task.dataset, _protocol(task)])
        command = shlex.join(["offline-cai", "scoreboard", source, "--only", f"{label}/{name}"])
        yield Cell(kind, label, name, None, (command,), fingerprint, runs / _slug(f"{label}/{name}"))


def _trained(recipe: Scoreboard, entry: Entry, name: str, seed: int, runs: Path) -> Cell:
    task = recipe.tasks[name]
    training, evaluating = _training_flags(recipe, entry, name, seed), _evaluation_flags(task, entry)
    path = config.find(entry.config, "configs")
    experiment.parse(config.override(config.read(path), training), str(path))
    evaluation.protocol(task.protocol, {k: v for k, v in evaluating.items() if not k.startswith("planner.")})
    made_from = config.override(config.read(path), training)
    fingerprint = _fingerprint([made_from, _protocol(task), _texts(entry.evaluate)])
    run = runs / f"{_slug(f'{path.stem}/{name}/{seed}')}-{_fingerprint(made_from)[:8]}"
    train = ["offline-cai", "train", entry.config, *_words(training), "--output", str(run)]
    evaluate = ["offline-cai", "evaluate", str(run), "--protocol", task.protocol, *_words(evaluating)]
    return Cell("trained", entry.label, name, seed, (shlex.join(train), shlex.join(evaluate)), fingerprint, run, entry)


def _training_flags(recipe: Scoreboard, entry: Entry, name: str, seed: int) -> dict[str, str]:
    task = recipe.tasks[name]
    dataset = {} if task.dataset is None else {"dataset": task.dataset}
    return {**_texts(entry.flags), **dataset, "protocol": task.protocol, "seed": str(seed)}


def _evaluation_flags(task: Task, entry: Entry) -> dict[str, str]:
    """References are cells of their own."""
    return {**task.flags, **_texts(entry.evaluate), "references": "[]"}


def _protocol(task: Task) -> dict[str, Any]:
    path = config.find(task.protocol, "eval")
    return {**config.read(path), **task.flags, "references": []}


def _texts(flags: Mapping[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in flags.items()}


def _words(flags: Mapping[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def _fingerprint(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def chosen(some: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells that a pattern such as "BC/hopper-*" matches; all without patterns.

    Raises:
        UserError: a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in some):
            raise UserError(f"no cell is called {pattern!r}; a name is label/task/seed, such as {some[-1].name!r}.")
    return [cell for cell in some if not patterns or any(fnmatch(cell.name, pattern) for pattern in patterns)]


def record(cell: Cell, output: Path) -> dict[str, Any] | None:
    """What is known of a cell; None if it was not made yet, or from something else, or (with a Notice) is damaged."""
    path = output / cell.file
    if not path.exists():
        return None
    try:
        found = read_json(path, "fingerprint")
        if found["fingerprint"] != cell.fingerprint:
            return None
        board.check(found, str(path))
    except UserError as error:
        warnings.warn(f"the cell {cell.name} is to do again: {error}", Notice, stacklevel=2)
        return None
    return found


def status(some: Sequence[Cell], output: Path) -> str:
    """A line for each cell: what there is, and the commands that make it."""
    lines = []
    for cell in some:
        found = record(cell, output)
        lines.append(
            f"{cell.name}: {'to do' if found is None else board.line(found)}\n    {' && '.join(cell.commands)}"
        )
    return "\n".join(lines)


# Making --------------------------------------------------------------------------------------------------------------


def run(recipe: Scoreboard, some: Sequence[Cell], output: Path, quiet: bool = False) -> int:
    """Make the cells that are not there, one after the other; a cell that fails is noted, and the others are made.

    Returns how many failed.

    Raises:
        Interrupted: the same command goes on with the cell that it stopped in.
    """
    failed = 0
    for number, cell in enumerate(some, start=1):
        with _claimed(cell.run.with_name(f".{cell.run.name}.lock")) as ours:
            found = record(cell, output)
            if found is not None and not found["error"]:
                continue
            print(f"[{number}/{len(some)}] {cell.name}", flush=True)
            if not ours:
                print("      another process is at it")
                continue
            try:
                result = {**_make(recipe, cell, quiet), "error": None}
            except (Interrupted, KeyboardInterrupt) as stop:
                again, status = "The same command goes on from there.", getattr(stop, "status", 130)
                raise Interrupted(f"stopped in the cell {cell.name}. {again}", status) from None
            except Exception as error:
                text = str(error) if isinstance(error, UserError) else f"it raised {type(error).__name__}: {error}"
                result, failed = {"error": " ".join(text.split())}, failed + 1
            about = {
                "cell": cell.name,
                "kind": cell.kind,
                "label": cell.label,
                "task": cell.task,
                "seed": cell.seed,
                "fingerprint": cell.fingerprint,
                "commands": list(cell.commands),
                "versions": versions(),
            }
            write_bytes(output / cell.file, _lines({**about, **result}).encode())
            print(f"      {board.line(result)}", flush=True)
    return failed


def _lines(data: Mapping[str, Any]) -> str:
    """JSON with a line for each key."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()) + "\n}\n"


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process is the one that makes a cell: it alone holds the lock, which ends with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _make(recipe: Scoreboard, cell: Cell, quiet: bool) -> dict[str, Any]:
    task = recipe.tasks[cell.task]
    if cell.kind == "dataset":
        return _own_score(task)
    if cell.kind == "reference":
        return _reference(task, cell.label, quiet)
    assert cell.entry is not None and cell.seed is not None
    exp = experiment.load(cell.entry.config, _training_flags(recipe, cell.entry, cell.task, cell.seed))
    times = cell.run.with_name(f"{cell.run.name}.cpu.json")
    with _counted(times, "train"):
        commands.train(exp, cell.run, resume=True, quiet=quiet)
    began = time.process_time()
    flags = _evaluation_flags(task, cell.entry)
    data = evaluation_commands.evaluate(cell.run, task.protocol, flags, overwrite=True, quiet=quiet)
    minutes = {"train": read_json(times)["train"] / 60, "evaluate": (time.process_time() - began) / 60}
    result = data["results"][data["policy"]]
    return {
        **_result(data["protocol"], result, minutes),
        "algorithm": exp.algorithm,
        "dataset": exp.dataset,
        "steps": exp.training.steps,
        "planner": data["planner"],
        "curve": list(trackers.evaluations(trackers.read(cell.run / "metrics.jsonl"))),
    }


@contextmanager
def _counted(path: Path, name: str) -> Iterator[None]:
    """Adds the CPU seconds of what is done inside to those noted in a file, however it ends."""
    began, before = time.process_time(), read_json(path).get(name, 0.0) if path.exists() else 0.0
    try:
        yield
    finally:
        write_text(path, json.dumps({name: before + time.process_time() - began}))


def _reference(task: Task, label: str, quiet: bool) -> dict[str, Any]:
    began = time.process_time()
    protocol = replace(evaluation.protocol(task.protocol, task.flags), references=(label,)).on(task.dataset)
    env = protocol.make()
    spec = env_spec(env)
    env.close()
    policies = evaluation_commands.reference_policies(protocol, task.dataset, PlannerConfig(execute="pursue"), 1)
    result = evaluation.evaluate(protocol, policies, spec, quiet)[label]
    minutes = {"train": 0.0, "evaluate": (time.process_time() - began) / 60}
    return {**_result(config.to_dict(protocol), result.to_json(), minutes), "dataset": task.dataset}


def _result(protocol: Mapping[str, Any], result: Mapping[str, Any], minutes: Mapping[str, float]) -> dict[str, Any]:
    """What is kept of an evaluation. Normalised scores are not: returns and protocol say them."""
    kept = {name: value for name, value in result.items() if name not in ("normalised", "seconds")}
    return {"protocol": dict(protocol), **kept, "cpu_minutes": dict(minutes)}


def _own_score(task: Task) -> dict[str, Any]:
    """The returns of all episodes of the dataset, those included that its end or its making cut."""
    assert task.dataset is not None
    protocol = evaluation.protocol(task.protocol).on(task.dataset)
    returns = catalogue.trajectories(task.dataset).returns
    if protocol.reference is not None:
        returns = scores.normalised(returns, *protocol.reference)
    score = {"name": protocol.name, "environment": protocol.environment, "score": protocol.score}
    about = {"protocol": score, "dataset": task.dataset}
    return {**about, **asdict(summarise(returns)), "cpu_minutes": {"train": 0.0, "evaluate": 0.0}}


# Showing -------------------------------------------------------------------------------------------------------------


def write(recipe: Scoreboard, some: Sequence[Cell], output: Path, page: Path | None = None) -> str:
    """Write table.md, scores.png and, where there are evaluations while training, curves.png; returns the table.

    `page` gets the table between the lines `<!-- scoreboard NAME -->` and `<!-- /scoreboard NAME -->`.

    Raises:
        UserError: the page does not have these lines.
    """
    records = [found for cell in some if (found := record(cell, output)) is not None]
    text = board.table(recipe.tasks, list(dict.fromkeys(cell.label for cell in some)), records)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "table.md", text)
    if page is not None:
        write_text(page, _between_marks(page, recipe.name, text))
    for name, picture in board.pictures(list(recipe.tasks), records).items():
        write_bytes(output / name, picture)
    return text


def _between_marks(page: Path, name: str, text: str) -> str:
    first, last = f"<!-- scoreboard {name} -->", f"<!-- /scoreboard {name} -->"
    with suppress(FileNotFoundError):
        before, found, rest = page.read_text(encoding="utf-8").partition(first)
        _, closed, after = rest.partition(last)
        if found and closed:
            return f"{before}{first}\n{text}{last}{after}"
    raise UserError(f"{page} has no lines {first} and {last} to write the table between.")
