"""Minari datasets in and out. A dataset is converted once to the trajectory store, which is what training reads."""

import hashlib
import json
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.namespace import create_namespace, list_local_namespaces

from offline_cai import config
from offline_cai.core import Episode, Spec
from offline_cai.data import minari_checks, minari_hdf5
from offline_cai.data.cache import converted
from offline_cai.data.intake import Reading
from offline_cai.data.minari_hdf5 import RawEpisode
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError, did_you_mean
from offline_cai.spaces import components, flatten, leaves, one_hot, spec_of, unflatten, unflatten_action


def dataset_root() -> Path:
    """Where Minari keeps its datasets: MINARI_DATASETS_PATH, or ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def local_ids() -> list[str]:
    root = dataset_root()
    found = (str(path.parent.relative_to(root)) for path in root.glob("**/*-v*/data"))
    return sorted(name for name in found if not name.startswith("."))


def exists(dataset_id: str) -> bool:
    return (dataset_root() / dataset_id / "data").is_dir()


def load(dataset_id: str) -> minari.MinariDataset:
    """A local Minari dataset.

    Raises:
        UserError: it is not there (the nearest ids, and how to collect or download it), or its files are damaged.
    """
    check_id(dataset_id)
    if not exists(dataset_id):
        raise UserError(_missing(dataset_id))
    try:
        minari_checks.check_metadata(dataset_root() / dataset_id / "data")
        return minari.load_dataset(dataset_id)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # Minari raises OSError, KeyError, JSONDecodeError, AssertionError and others
        raise minari_checks.damaged(dataset_id, dataset_root() / dataset_id, error) from error


def check_id(dataset_id: str) -> None:
    """Raise a UserError unless Minari takes this id, for reading and for writing."""
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{dataset_id!r} is no Minari dataset id: they read namespace/environment/name-v0.") from None
    inside = [str(parent) for parent in Path(dataset_id).parents if exists(str(parent))]
    if inside:
        raise UserError(f"{dataset_id!r} would lie inside the dataset {inside[0]!r}: take another namespace.")


def recipes() -> dict[str, str]:
    """Recipe by dataset id; files that are no recipes are passed over."""
    found = {}
    for name in config.names("datasets"):
        with suppress(UserError, OSError):
            dataset_id = config.read(config.find(name, "datasets")).get("id")
            if isinstance(dataset_id, str):
                found[dataset_id] = name
    return found


def _missing(dataset_id: str) -> str:
    known_recipes = recipes()
    if dataset_id in known_recipes:
        how = f"Collect it with `offline-cai collect {known_recipes[dataset_id]}`."
    else:
        known = {*local_ids(), *known_recipes}
        how = f"Among those here or that a recipe collects {did_you_mean(dataset_id, known)} "
        how += f"A public one is downloaded with `minari download {dataset_id}`"
        how += "." if _online() else "; but there is no network here now."
    return f"there is no dataset {dataset_id!r} in {dataset_root()}. {how}"


def _online(seconds: float = 2.0) -> bool:
    """Whether the remote that Minari would ask answers; Minari itself retries for half a minute before it gives up."""
    hosts = {"hf": "huggingface.co", "gcp": "storage.googleapis.com"}
    scheme = os.environ.get("MINARI_REMOTE", "hf://farama-minari").split(":")[0]
    try:
        socket.create_connection((hosts.get(scheme, hosts["hf"]), 443), timeout=seconds).close()
    except OSError:
        return False
    return True


# Reading -------------------------------------------------------------------------------------------------------------


def trajectories(source: str | minari.MinariDataset, repair: bool = False) -> Trajectories:
    """The store of a Minari dataset: converted on first use, mapped afterwards.

    Args:
        source: an id, or a dataset that Minari's `filter_episodes` or `split_dataset` made: its episodes alone then.
        repair: leave damaged episodes out; they are named in the store's `info["dropped"]`.

    Raises:
        UserError: the dataset is missing or damaged (dataset, episode, field and mend are named), or its spaces are of
            a kind that this version does not train on.
    """
    dataset, name = (load(source), source) if isinstance(source, str) else (source, source.spec.dataset_id)
    numbers, folder = dataset.episode_indices, Path(dataset.storage.data_path).parent
    whole = len(numbers) == dataset.storage.total_episodes
    if not whole:
        name += f"-{len(numbers)}-episodes-{hashlib.sha256(np.asarray(numbers, np.int64).tobytes()).hexdigest()[:8]}"

    def read() -> tuple[Spec, Iterator[Reading]]:
        about = dataset.storage.metadata if whole else None
        return _spec(dataset), minari_checks.readings(_raw_episodes(dataset), name, folder, about)

    return converted(name, folder, read, repair)


def _spec(dataset: minari.MinariDataset) -> Spec:
    dt = metadata(dataset).get("dt")
    if dt is not None and not (isinstance(dt, int | float) and 0 < dt < np.inf):
        raise UserError(
            f"{_metadata_file(dataset)}: in 'offline_cai', dt is {dt!r}, not seconds per step. Mend or remove it."
        )
    return spec_of(dataset.observation_space, dataset.action_space, dt)


def metadata(dataset: minari.MinariDataset) -> dict[str, Any]:
    """What `write` noted beside Minari's own metadata; empty for a dataset that others made."""
    note = dataset.storage.metadata.get("offline_cai", "{}")
    try:
        found = json.loads(note) if isinstance(note, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{_metadata_file(dataset)}: 'offline_cai' is no JSON object. Mend or remove it.")
    return found


def _metadata_file(dataset: minari.MinariDataset) -> Path:
    return Path(dataset.storage.data_path) / "metadata.json"


def _raw_episodes(dataset: minari.MinariDataset) -> Iterator[RawEpisode | Exception]:
    """Episodes as Minari keeps them, a row of numbers for each observation and action; errors in place of bad ones."""
    obs_space, action_space = dataset.observation_space, dataset.action_space
    path = Path(dataset.storage.data_path) / "main_data.hdf5"
    if path.is_file():
        names = _hdf5_names("observations", obs_space), _hdf5_names("actions", action_space)
        for raw in minari_hdf5.episodes(path, *names, dataset.episode_indices):
            yield raw if isinstance(raw, Exception) else _with_choices(obs_space, raw)
        return
    for number in dataset.episode_indices:
        try:
            (e,), (about,) = dataset.iterate_episodes([number]), dataset.storage.get_episode_metadata([number])
            obs, action = flatten(obs_space, e.observations), components(action_space, e.actions)
            reward, terminations, truncations = (np.asarray(x) for x in (e.rewards, e.terminations, e.truncations))
            yield RawEpisode(obs, action, reward, terminations, truncations, about.get("total_steps"))
        except Exception as error:  # Minari and Arrow raise OSError, KeyError, ValueError, ArrowInvalid and others
            yield error


def _with_choices(obs_space: gym.Space, raw: RawEpisode) -> RawEpisode | Exception:
    try:
        return raw._replace(obs=one_hot(obs_space, raw.obs))
    except ValueError as error:  # a choice that the space does not have
        return error


def _hdf5_names(group: str, space: gym.Space) -> dict[str, int]:
    """Names, by Minari's rule, and widths of the HDF5 datasets of a space's leaves, in the order of `spaces.leaves`."""
    found = {}
    for leaf in leaves(space):
        path = [f"_index_{key}" if isinstance(key, int) else key for key in leaf.path]
        found["/".join([group, *path])] = leaf.components
    return found


# Writing -------------------------------------------------------------------------------------------------------------


def write(
    dataset_id: str,
    spec: Spec,
    episodes: Sequence[Episode],
    env: gym.Env,
    eval_env: gym.Env | None = None,
    reference: tuple[float, float] | None = None,
    note: dict[str, Any] | None = None,
    **about: Any,
) -> Path:
    """Write episodes as a Minari dataset, whole or not at all, and return its folder.

    `reference` holds the returns that score 0 and 1 in `eval_env`; `note` is kept as JSON; `about` goes to Minari
    (`algorithm_name`, `author`, `author_email`, `code_permalink`, `description`, `requirements`).

    Raises:
        UserError: the id is not valid or exists already, or the disk refuses.
    """
    check_id(dataset_id)
    target = dataset_root() / dataset_id
    if target.exists():
        raise UserError(
            f"the dataset {dataset_id!r} exists already in {target} and is not overwritten. Remove it with "
            f"`minari delete {dataset_id}`, or collect under another name or version."
        )
    buffers = [_buffer(env.observation_space, env.action_space, episode) for episode in episodes]
    low, high = reference or (None, None)
    namespace = dataset_id.rpartition("/")[0]
    try:
        dataset_root().mkdir(parents=True, exist_ok=True)
        _require_space(buffers)
        with tempfile.TemporaryDirectory(dir=dataset_root(), prefix=".writing-") as temporary:
            with _minari_root(temporary), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # Minari asks for an e-mail address, among others
                dataset = minari.create_dataset_from_buffers(
                    dataset_id, buffers, env=env, eval_env=eval_env, ref_min_score=low, ref_max_score=high, **about
                )
                dataset.storage.update_metadata({"offline_cai": json.dumps({"dt": spec.dt, **(note or {})})})
            if namespace and namespace not in list_local_namespaces():
                create_namespace(namespace)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary) / dataset_id, target)
    except OSError as error:
        raise UserError(f"cannot write the dataset {dataset_id!r} to {target}: {error}.") from error
    return target


def _require_space(buffers: Sequence[EpisodeBuffer]) -> None:
    """Raise a UserError if the disk has no room: HDF5 would crash the process instead of raising."""
    per_episode = 16 * 1024  # of HDF5's own book-keeping, for a dozen small datasets
    numbers = sum(
        np.asarray(leaf).nbytes
        for b in buffers
        for leaf in (*_leaves(b.observations), b.actions, b.rewards, b.terminations, b.truncations)
    )
    needed, free = 2 * numbers + per_episode * len(buffers) + (1 << 20), shutil.disk_usage(dataset_root()).free
    if free < needed:
        raise UserError(
            f"the disk of {dataset_root()} has {free / 2**20:.0f} MiB left, and the dataset needs up to "
            f"{needed / 2**20:.0f} MiB: free some, or set MINARI_DATASETS_PATH to another disk."
        )


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | tuple):
        for branch in tree.values() if isinstance(tree, dict) else tree:
            yield from _leaves(branch)
    else:
        yield tree


def _buffer(obs_space: gym.Space, action_space: gym.Space, episode: Episode) -> EpisodeBuffer:
    ends = np.zeros((2, len(episode.reward)), dtype=bool)
    ends[0 if episode.terminal else 1, -1] = True
    return EpisodeBuffer(
        observations=unflatten(obs_space, episode.obs),
        actions=unflatten_action(action_space, episode.action),
        rewards=episode.reward,
        terminations=ends[0],
        truncations=ends[1],
    )


@contextmanager
def _minari_root(path: str) -> Iterator[None]:
    """Minari reads its root from the environment at each call and takes no argument for it."""
    before = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = before
