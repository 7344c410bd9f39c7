"""What Minari's files have to say, and which episodes are sound: Minari itself loads many damaged ones silently."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from offline_cai.core import Episode
from offline_cai.data import minari_hdf5
from offline_cai.data.checks import both_flags, some
from offline_cai.data.intake import Reading
from offline_cai.data.minari_hdf5 import RawEpisode
from offline_cai.errors import Notice, UserError
from offline_cai.files import read_json

KEYS = ("total_episodes", "total_steps", "data_format", "minari_version", "dataset_id")


def check_metadata(data: Path) -> None:
    """Check the metadata in a dataset's `data` folder before Minari reads them.

    Raises:
        UserError: no JSON, a missing key, or counts that are none or that name twice the episodes that are there.
    """
    file = data / "metadata.json"
    about = read_json(file, *KEYS)
    for name in ("total_episodes", "total_steps"):
        if type(about[name]) is not int or about[name] < 0:
            raise UserError(f"{file}: {name!r} is {about[name]!r}, not a count. Restore the file, or write the number.")
    held = episodes_held(data)
    if about["total_episodes"] > 2 * held:
        raise UserError(
            f"{file} counts {about['total_episodes']} episodes, but only {held} are there: the rest is lost. Collect "
            "or download the dataset again."
        )


def episodes_held(data: Path) -> int:
    """How many episodes a dataset's `data` folder holds, whatever its metadata say."""
    if (data / "main_data.hdf5").is_file():
        return minari_hdf5.count(data / "main_data.hdf5")
    return sum(path.name.isdecimal() for path in data.iterdir())


def readings(
    raws: Iterable[RawEpisode | Exception], name: str, folder: Path, about: dict[str, Any] | None
) -> Iterator[Reading]:
    """Raw episodes of the dataset in a folder, or what reading them raised, as what goes into a store.

    `about` is its metadata, whose counts are compared with what is read; None for a part of a dataset.
    """
    steps = terminals = cuts = both = 0
    without_flag: list[int] = []
    whole = True
    for number, raw in enumerate(raws):
        if isinstance(raw, Exception):
            whole = False
            yield damaged(name, folder, raw, number)
            continue
        steps += raw.reward.size
        problem = _problem(raw)
        if problem:
            yield UserError(f"dataset {name!r} ({folder}), episode {number}: {problem}")
            continue
        terminal, cut = bool(raw.terminations[-1:].any()), bool(raw.truncations[-1:].any())
        terminals, cuts, both = terminals + terminal, cuts + cut, both + (terminal and cut)
        if not terminal and not cut:
            without_flag.append(number)
        yield Episode(raw.obs, raw.action, raw.reward, terminal, raw.log_prob)
    if without_flag:
        yield Notice(f"{some('episode', without_flag)} without an end flag: taken as cut by time.")
    for text in both_flags(both, terminals, cuts):
        yield Notice(text)
    if about is None:
        return
    if whole and steps != about["total_steps"]:
        yield Notice(f"metadata.json counts {about['total_steps']} steps, and its episodes hold {steps}.")
    held = episodes_held(folder / "data")
    if held > about["total_episodes"]:
        yield Notice(
            f"metadata.json counts {about['total_episodes']} episodes, and {held} are there: the others are not read, "
            "neither here nor by Minari. Correct 'total_episodes' if they belong to it."
        )


def damaged(name: str, folder: Path, error: Exception, episode: int | None = None) -> UserError:
    """The error about a dataset, or one of its episodes, that Minari or HDF5 could not read."""
    where = "" if episode is None else f", episode {episode}"
    return UserError(
        f"the Minari dataset {name!r} in {folder}{where} cannot be read "
        f"({type(error).__name__}: {' '.join(str(error).split()) or 'no further word'}). "
        f"Its files are damaged: remove it with `minari delete {name}` and collect or download it again."
    )


def _problem(raw: RawEpisode) -> str | None:
    """What is wrong with an episode's counts and end flags; its numbers are checked later, many at once."""
    if raw.reward.ndim != 1 or not raw.reward.size or not raw.action.size:
        return f"rewards have shape {raw.reward.shape} and actions {raw.action.shape}: there are no steps. Drop it."
    steps = len(raw.reward)
    if raw.counted is not None and raw.counted != steps:
        return (
            f"its attribute 'total_steps' counts {raw.counted} steps, but there are {steps} rewards: some of it is "
            "lost. Drop it, or collect or download the dataset again."
        )
    for name, flags in (("terminations", raw.terminations), ("truncations", raw.truncations)):
        if flags.shape != (steps,) or flags.dtype != bool:
            return f"{name!r} are {flags.dtype} of shape {flags.shape} beside {steps} rewards. Drop it."
    ends = np.flatnonzero(raw.terminations | raw.truncations)
    if len(ends) and ends[0] < steps - 1:
        return f"an end is flagged at step {ends[0]}, but the episode goes on to step {steps - 1}. Split it there."
    return None
