"""One name for a dataset, whatever its kind: a Minari id, a D4RL name, or the path of a D4RL file or of own arrays."""

import io
import json
import math
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, Literal, NamedTuple

from offline_cai.data import arrays, d4rl, d4rl_download, d4rl_file, minari, minari_download, scores
from offline_cai.data.cache import cache_at
from offline_cai.data.trajectories import Trajectories, digests, verify
from offline_cai.errors import Notice, UserError

Kind = Literal["arrays", "d4rl", "minari"]


def kind(name: str) -> Kind:
    """What a name means: a path that ends in .npz, one that ends in .hdf5 or .h5 or one of D4RL's names, or an id."""
    if name.endswith(".npz"):
        return "arrays"
    return "d4rl" if name.endswith((".hdf5", ".h5")) or name in d4rl_download.table() else "minari"


def trajectories(name: str, repair: bool = False) -> Trajectories:
    """The store of a dataset: converted on first use, mapped afterwards.

    `repair` leaves damaged episodes out, and `info["dropped"]` says which and why. That makes a store of its own:
    whoever asks without gets the error.

    Raises:
        UserError: it is not there (how to get it), or it is damaged (file, episode, field and mend).
    """
    return {"arrays": arrays, "d4rl": d4rl, "minari": minari}[kind(name)].trajectories(name, repair=repair)


def validate(name: str) -> Trajectories:
    """Read every number of a dataset again, with all checks, and compare it with the store it was converted to.

    What is odd, but can be used, is in the store's `info["warnings"]`.

    Raises:
        UserError: the source is damaged, the store is, or they do not agree.
    """
    store = trajectories(name)
    assert store.path is not None
    verify(store.path)
    source = str(d4rl_file.locate(name)[1]) if kind(name) == "d4rl" else name  # downloads live in the cache too
    with tempfile.TemporaryDirectory() as folder, cache_at(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # they were given when it was converted
        again = trajectories(source)
        assert again.path is not None
        if digests(again.path) != digests(store.path):
            raise UserError(f"{name!r} no longer holds what was converted to {store.path}: delete that folder.")
    return store


def download(name: str, quiet: bool = False) -> str:
    """Fetch a public dataset, by its D4RL name or Minari id (see `minari_download`); returns the name it has here.

    `quiet` leaves out the progress bars.

    Raises:
        UserError: no such dataset, no network (at once), a refusal, or the disk refuses; nothing is left behind then.
    """
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        if kind(name) == "minari":
            return minari_download.download(name)
        d4rl_download.download(name)  # for a path, raises with D4RL's names
        return name


class Entry(NamedTuple):
    """A dataset that is here, or that a recipe collects. Counts are None where only reading it would tell."""

    kind: Literal["d4rl", "minari", "recipe"]
    where: str
    episodes: int | None = None
    steps: int | None = None


def entries() -> dict[str, Entry]:
    """The Minari datasets and D4RL files that are here, and the datasets that recipes collect, by name."""
    found = {id_: Entry("recipe", f"offline-cai collect {recipe}") for id_, recipe in minari.recipes().items()}
    for path in sorted(d4rl_download.file_of("any").parent.glob("*.hdf5")):
        found[path.stem] = Entry("d4rl", str(path))
    for id_ in minari.local_ids():
        found[id_] = Entry("minari", str(minari.dataset_root() / id_), *minari.counts(id_))
    return found


def note(name: str) -> dict[str, Any]:
    """What this package noted when it collected a dataset; empty for a dataset that others made."""
    return minari.metadata(minari.load(name)) if kind(name) == "minari" else {}


def environment(name: str) -> tuple[str, Mapping[str, Any]] | None:
    """Gymnasium id and arguments of the environment that a dataset was collected in, if it names one."""
    spec = minari.load(name).spec.env_spec if kind(name) == "minari" else None
    return None if spec is None else (spec.id, spec.kwargs)


class Simulator(NamedTuple):
    """A Gymnasium id with the arguments of `gymnasium.make`, and the wrappers around it by class and arguments."""

    environment: str
    kwargs: dict[str, Any]
    wrappers: list[tuple[str, dict[str, Any]]]


def evaluation_environment(name: str) -> Simulator | None:
    """What Minari's `recover_environment(eval_env=True)` would make: the environment to evaluate in, or to collect in.

    None if the dataset names none. Only the names in it are taken: code that it points to is not run.

    Raises:
        UserError: the dataset's metadata are damaged.
    """
    about = minari.load(name).storage.metadata if kind(name) == "minari" else {}
    text = about.get("eval_env_spec") or about.get("env_spec")
    if text is None:
        return None
    try:
        spec = json.loads(text)
        limit = spec["max_episode_steps"]
        kwargs = {**spec["kwargs"], **({} if limit is None else {"max_episode_steps": limit})}
        wrappers = [(wrapper["name"], dict(wrapper["kwargs"] or {})) for wrapper in spec["additional_wrappers"]]
        return Simulator(spec["id"], kwargs, wrappers)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name!r}: its evaluation environment cannot be read ({error}): mend its metadata.") from None


def reference(name: str) -> tuple[float, float] | None:
    """The returns that score 0 and 100 (Minari's 0 and 1), by Minari's metadata or D4RL's table; None: unknown."""
    if kind(name) == "d4rl":
        task = d4rl_file.locate(name)[0]
        return scores.reference(task) if task in scores.table() else None
    about = minari.load(name).storage.metadata if kind(name) == "minari" else {}
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    if low is None or high is None:
        return None
    if not all(type(x) in (int, float) and math.isfinite(x) for x in (low, high)) or low == high:
        raise UserError(f"{name!r}: its reference scores {low!r} and {high!r} are no scale: mend its metadata.json.")
    return low, high


# Writing -------------------------------------------------------------------------------------------------------------


def check_target(target: str) -> None:
    """Raise a UserError unless `write` can write there: before the work that makes what is written."""
    if target in d4rl_download.table():
        raise UserError(f"{target!r} is D4RL's own name: write to a path that ends in .hdf5, or take another name.")
    if kind(target) == "minari":
        minari.check_free(target)
    elif Path(target).exists():
        raise UserError(f"{target} exists already and is not overwritten. Remove it, or write to another name.")


def write(target: str, store: Trajectories, source: str | None = None) -> Path:
    """Write any store as a dataset of another format, whole or not at all; returns its file or folder.

    Args:
        target: a path that ends in .hdf5 (D4RL's format) or .npz (arrays), or a Minari id.
        source: the name of the dataset that the store was converted from. From Minari to Minari, its spaces,
            environments, references and metadata are kept.

    Raises:
        UserError: the target exists already, is D4RL's own name or no valid id, or the disk refuses.
    """
    check_target(target)
    if kind(target) == "arrays":
        return arrays.write(target, store)
    if kind(target) == "d4rl":
        return d4rl.write(target, store)
    like = minari.origin(minari.load(source)) if source is not None and kind(source) == "minari" else {}
    return minari.write(target, store.spec, store.episodes(), **like)
