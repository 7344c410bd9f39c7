"""What `offline-cai data` does: each command gives plain facts, and `text` shows them to people."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from offline_cai import config
from offline_cai.data import catalogue, describe, minari, stats
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError


def entries() -> dict[str, Any]:
    """Datasets by name: those that are here, and those that a recipe collects."""
    return {name: entry._asdict() for name, entry in catalogue.entries().items()}


def show(name: str, picture: Path | None = None) -> dict[str, Any]:
    """What is in a dataset; also drawn to a new file `picture`."""
    if picture is not None and picture.exists():
        raise UserError(f"{picture} exists already and is not overwritten: name another file.")
    store = catalogue.trajectories(name)
    if picture is not None:
        try:
            describe.picture(store, picture)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot draw to {picture}: {error}.") from error
    return describe.describe(store)


def show_stats(name: str) -> dict[str, Any]:
    """What normalisers see of a dataset, its returns, and its scores where it has references."""
    return {"dataset": name, **stats.stats(catalogue.trajectories(name), catalogue.reference(name))}


def validate(name: str) -> dict[str, Any]:
    """A dataset after every number of it was read and checked again, and what is odd in it but can be used."""
    store = catalogue.validate(name)
    return {"dataset": name, "valid": True, **_counts(store), "warnings": store.info.get("warnings", [])}


def download(name: str, quiet: bool = False) -> dict[str, Any]:
    """A public dataset, fetched and converted, which checks it."""
    return convert(catalogue.download(name, quiet))


def convert(name: str, to: str | None = None, repair: bool = False) -> dict[str, Any]:
    """A dataset, converted to the store that training reads, or written in another format as `to`.

    `repair` leaves damaged episodes out and names them. The name may also be a run's folder: what its replay holds then
    becomes a dataset.
    """
    began = time.monotonic()
    if to is not None:
        catalogue.check_target(to)
    if (Path(name) / "config.yaml").is_file():
        return {**_convert_replay(Path(name), to), "seconds": time.monotonic() - began}
    store = catalogue.trajectories(name, repair)
    written = store.path if to is None else catalogue.write(to, store, name)
    facts = {"dataset": name, "written to": str(written), **_counts(store), "seconds": time.monotonic() - began}
    return facts | ({"dropped": store.info["dropped"]} if repair else {})


def _convert_replay(run: Path, to: str | None) -> dict[str, Any]:
    """The replay of a run's last checkpoint, written as a dataset; of a Minari one the environment is the run's.

    Raises:
        UserError: no target is named, or the run has no replay.
    """
    from offline_cai.training.gathered import gathered

    if to is None:
        raise UserError(f"{run} is a run: name the dataset that its replay becomes with --to.")
    exp, environment, step, spec, episodes = gathered(run)
    store = Trajectories.from_episodes(spec, episodes, str(run))
    if catalogue.kind(to) != "minari":
        written = catalogue.write(to, store)
    else:
        with closing(environment.make()) as env:
            note = {"experiment": config.to_dict(exp), "step": step}
            about = f"All that a run of {exp.algorithm} gathered in {step} updates."
            written = minari.write(
                to, store.spec, store.episodes(), env, note=note, algorithm_name=exp.algorithm, description=about
            )
    return {"dataset": str(run), "written to": str(written), **_counts(store)}


def _counts(store: Trajectories) -> dict[str, Any]:
    return {"episodes": store.num_episodes, "steps": store.num_steps}


def text(command: str, facts: dict[str, Any]) -> str:
    """The facts of a command as a table."""
    if command == "stats":
        return stats.text(facts)
    return _listing(facts) if command == "list" else describe.table(facts)


def _listing(facts: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'name':44} {'kind':7} {'episodes':>9} {'steps':>11}  where, or how to get it"]
    for name, entry in facts.items():
        episodes, steps = ("" if entry[key] is None else entry[key] for key in ("episodes", "steps"))
        lines.append(f"{name:44} {entry['kind']:7} {episodes:>9} {steps:>11}  {entry['where']}")
    return "\n".join(lines) if facts else "there are none."
