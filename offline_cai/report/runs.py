"""The runs that a report is about, read from their folders. What cannot be read becomes a sentence."""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from offline_cai import config
from offline_cai.errors import UserError
from offline_cai.evaluation.statistics import Summary
from offline_cai.files import read_json
from offline_cai.training import checkpoint, trackers
from offline_cai.training.folder import is_run

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Settings:
    """What a page needs of config.yaml."""

    name: str
    algorithm: str
    dataset: str | None
    seed: int
    training: dict[str, Any]
    protocol: str | None = None


@dataclass(frozen=True)
class _Scores(Summary):
    """What a table needs of a policy's results."""

    returns: tuple[float, ...]
    normalised: tuple[float, ...] | None
    repeated: tuple[Any, ...] = ()
    cut: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Protocol:
    """What a table needs of a protocol."""

    name: str
    environment: str
    kwargs: dict[str, Any]
    wrapper: str | None
    options: dict[str, Any]
    score: tuple[float, float] | str | None
    seed: int
    episodes: int
    environments: int


@dataclass(frozen=True)
class _Results:
    """What a page needs of results.json."""

    results: dict[str, dict[str, Any]]
    paired: dict[str, dict[str, Any]]
    protocol: dict[str, Any]
    policy: str
    planner: dict[str, Any]


class Run(NamedTuple):
    """A run's folder, what its config.yaml says, its metrics, and its evaluation if there is one."""

    folder: Path
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    results: dict[str, Any] | None

    @property
    def seed(self) -> int:
        return self.settings["seed"]


def attempt(notes: list[str], what: str, make: Callable[[], _T]) -> _T | None:
    """What `make` gives; if it is damaged or lacks something, None, and a sentence in `notes` about `what`."""
    try:
        return make()
    except UserError as error:
        notes.append(f"{what} left out: {error}")
    except KeyError as error:
        notes.append(f"{what} left out: {error} is missing in its files, which are damaged or of an earlier version.")
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        notes.append(f"{what} left out: its files are damaged ({error}).")
    return None


def read(folder: Path, notes: list[str]) -> Run:
    """A run; what is damaged, unfinished or not there yet becomes a sentence in `notes`.

    Raises:
        UserError: the folder is no run's, or its config.yaml is damaged.
    """
    path = folder / "config.yaml"
    if not is_run(folder):
        raise UserError(f"{folder} holds no config.yaml: name the folder that `offline-cai train` made.")
    settings = config.read(path)
    config.part(_Settings, settings, f"{path} is damaged")
    asked = settings["training"].get("steps", 0)
    if not isinstance(asked, int):
        raise UserError(f"{path} is damaged: training: steps: expected int, not {asked!r}.")
    settings.setdefault("protocol", None)
    rows, results = None, None
    if (folder / "metrics.jsonl").is_file():
        rows = attempt(notes, f"the learning curves of {folder} are", lambda: trackers.read(folder / "metrics.jsonl"))
    if (folder / "evaluation" / "results.json").is_file():
        results = attempt(notes, f"the evaluation of {folder} is", lambda: _results(folder))
    saved = checkpoint.checkpoints(folder / "checkpoints")
    done = int(saved[-1].name.removeprefix("step-")) if saved else 0
    if not done:
        notes.append(f"{folder} holds no checkpoint: its training failed or has not come far; train it again.")
    elif done < asked:
        notes.append(f"{folder} has {done} of {asked} steps: go on with `offline-cai train --resume {folder}`.")
    if done and not (folder / "evaluation").exists():
        notes.append(f"{folder} has no evaluation: `offline-cai evaluate {folder}` makes one.")
    return Run(folder, settings, rows or [], results)


def _results(folder: Path) -> dict[str, Any]:
    """What results.json holds, after a look at all that one table makes of the results of several runs."""
    path = folder / "evaluation" / "results.json"
    data = read_json(path)
    found = config.part(_Results, data, str(path))
    protocol = config.part(_Protocol, found.protocol, f"{path}: protocol")
    if found.policy not in found.results:
        raise UserError(f"{path}: there are no results of its policy {found.policy!r}.")
    for name, some in found.results.items():
        scores = config.part(_Scores, some, f"{path}: results.{name}")
        if {scores.n, len(scores.returns), len(scores.normalised or scores.returns)} != {protocol.episodes}:
            raise UserError(f"{path}: results.{name} are not of the protocol's {protocol.episodes} episodes.")
    return data


def groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but the seed, by a label."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        same = {name: value for name, value in run.settings.items() if name != "seed"}
        found.setdefault(json.dumps(dict(config.flatten(same)), sort_keys=True, default=str), []).append(run)
    return dict(zip(_labels([some[0] for some in found.values()]), found.values(), strict=True))


def _labels(runs: Sequence[Run]) -> list[str]:
    """The names of runs, with the fields in which those of one name differ."""
    labels = []
    for run in runs:
        name = run.settings["name"]
        others = [dict(config.flatten(other.settings)) for other in runs if other.settings["name"] == name]
        differ = [
            f"{field} {value}"
            for field, value in config.flatten(run.settings)
            if field != "seed" and any(other.get(field, value) != value for other in others)
        ]
        labels.append(f"{name} ({', '.join(differ)})" if differ else name)
    return [label if labels.count(label) == 1 else f"{label} #{i}" for i, label in enumerate(labels, start=1)]
