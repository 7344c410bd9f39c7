"""Minari datasets in and out. A dataset is converted once to the trajectory store, which is what training reads."""

import hashlib
import inspect
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import gymnasium as gym
import minari
import numpy as np
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.remotes import DEFAULT_REMOTE

from offline_cai import config
from offline_cai.core import Episode, Spec
from offline_cai.data import d4rl_download, minari_checks, minari_hdf5
from offline_cai.data.cache import converted
from offline_cai.data.intake import Reading
from offline_cai.data.minari_hdf5 import RawEpisode
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError, did_you_mean
from offline_cai.files import read_json
from offline_cai.interrupts import Interrupt
from offline_cai.spaces import components, flatten, leaves, one_hot, spaces_of, spec_of, unflatten, unflatten_action

HUB_SERVER, STORAGE_SERVER = "https://huggingface.co", "https://storage.googleapis.com"
MARGIN = 32 << 20  # bytes that have to be free on the disk while a dataset is written
LOG_PROB = "action_log_probs"  # of an episode's infos, as D4RL calls them
_STORAGE_KEYS = {
    *("dataset_id", "minari_version", "total_episodes", "total_steps", "dataset_size", "data_format", "jpeg_encoding"),
    *("observation_space", "action_space", "env_spec", "combined_datasets", "offline_cai"),
}


def dataset_root() -> Path:
    """Where Minari keeps its datasets: MINARI_DATASETS_PATH, or ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def local_ids() -> list[str]:
    root = dataset_root()
    found = (str(path.parent.relative_to(root)) for path in root.glob("**/*-v*/data"))
    return sorted(name for name in found if not name.startswith("."))


def counts(dataset_id: str) -> tuple[int | None, int | None]:
    """Episodes and steps that a local dataset's metadata tell; None where they tell none."""
    with suppress(UserError):
        about = read_json(dataset_root() / dataset_id / "data" / METADATA_FILE_NAME)
        episodes, steps = (about.get(name) for name in ("total_episodes", "total_steps"))
        return episodes if type(episodes) is int else None, steps if type(steps) is int else None
    return None, None


def exists(dataset_id: str) -> bool:
    return os.path.isdir(dataset_root() / dataset_id / "data")


def split_remote(name: str) -> tuple[str | None, str]:
    """The remote and the id of a name such as "hf://farama-minari/D4RL/door/human-v2"; no remote: Minari's default."""
    scheme, separator, path = name.rpartition("://")
    if not separator:
        return None, name
    owner, _, dataset_id = path.partition("/")
    return f"{scheme}://{owner}", dataset_id


def load(dataset_id: str) -> minari.MinariDataset:
    """A local Minari dataset, by its id, before which its remote may stand.

    Raises:
        UserError: it is not there (the nearest ids, and how to collect or download it), or its files are damaged.
    """
    folder, dataset_id = _folder(dataset_id), split_remote(dataset_id)[1]
    try:
        minari_checks.check_metadata(folder / "data")
        return minari.load_dataset(dataset_id)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # Minari raises OSError, KeyError, JSONDecodeError, AssertionError and others
        raise minari_checks.damaged(dataset_id, folder, error) from error


def _folder(name: str) -> Path:
    dataset_id = split_remote(name)[1]
    check_id(dataset_id)
    if not exists(dataset_id):
        raise UserError(_missing(name))
    return dataset_root() / dataset_id


def check_id(dataset_id: str) -> None:
    """Raise a UserError unless Minari takes this id, for reading and for writing."""
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"{dataset_id!r} is no Minari dataset id: they read namespace/environment/name-v0 (and files end in "
            ".hdf5 or .npz)."
        ) from None
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


def _missing(name: str) -> str:
    (remote, dataset_id), known_recipes = split_remote(name), recipes()
    if dataset_id in known_recipes:
        how = f"Collect it with `offline-cai collect {known_recipes[dataset_id]}`."
    else:
        known = {*local_ids(), *known_recipes, *d4rl_download.table()}
        how = f"Among those here or that a recipe collects {did_you_mean(dataset_id, known)} "
        how += f"A public one is downloaded with `offline-cai data download {name}`"
        how += "." if online(remote) else "; but there is no network here now."
    return f"there is no dataset {dataset_id!r} in {dataset_root()}. {how}"


def online(remote: str | None = None, seconds: float = 2.0) -> bool:
    """Whether the remote that Minari would ask answers; Minari itself retries for half a minute before it gives up.

    `remote` as in MINARI_REMOTE, which it defaults to. Where HTTPS goes through a proxy, the proxy is asked.
    """
    scheme = (remote or os.environ.get("MINARI_REMOTE") or DEFAULT_REMOTE).partition(":")[0]
    server = STORAGE_SERVER if scheme == "gcp" else os.environ.get("HF_ENDPOINT") or HUB_SERVER
    try:
        at = urlsplit(getproxies().get("https") or server)
        socket.create_connection((at.hostname, at.port or 443), timeout=seconds).close()
    except (OSError, ValueError):
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
    name, folder = (split_remote(source)[1], _folder(source)) if isinstance(source, str) else _part(source)

    def read() -> tuple[Spec, Iterator[Reading]]:
        dataset = load(source) if isinstance(source, str) else source
        about = dataset.storage.metadata if _is_whole(dataset) else None
        return _spec(dataset), minari_checks.readings(_raw_episodes(dataset), name, folder, about)

    return converted(name, folder, read, repair)


def _part(dataset: minari.MinariDataset) -> tuple[str, Path]:
    """A name for the episodes of a dataset, and its folder."""
    name, numbers = dataset.spec.dataset_id, np.asarray(dataset.episode_indices, np.int64)
    if not _is_whole(dataset):
        name += f"-{len(numbers)}-episodes-{hashlib.sha256(numbers.tobytes()).hexdigest()[:8]}"
    return name, Path(dataset.storage.data_path).parent


def _is_whole(dataset: minari.MinariDataset) -> bool:
    return np.array_equal(dataset.episode_indices, np.arange(dataset.storage.total_episodes))


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
    path, logged = Path(dataset.storage.data_path) / "main_data.hdf5", metadata(dataset).get("log_probs", False)
    if path.is_file():
        names = _hdf5_names("observations", obs_space), _hdf5_names("actions", action_space)
        infos = f"infos/{LOG_PROB}" if logged else None
        chosen = any(leaf.choices for leaf in leaves(obs_space))
        for raw in minari_hdf5.episodes(path, *names, dataset.episode_indices, infos):
            yield raw if isinstance(raw, Exception) or not chosen else _with_choices(obs_space, raw)
        return
    for number in dataset.episode_indices:
        try:
            (e,), (about,) = dataset.iterate_episodes([number]), dataset.storage.get_episode_metadata([number])
            obs, action = flatten(obs_space, e.observations), components(action_space, e.actions)
            reward, terminations, truncations = (np.asarray(x) for x in (e.rewards, e.terminations, e.truncations))
            log_prob = np.asarray(e.infos[LOG_PROB]) if logged else None
            yield RawEpisode(obs, action, reward, terminations, truncations, about.get("total_steps"), log_prob)
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
    episodes: Iterable[Episode],
    env: gym.Env | EnvSpec | None = None,
    eval_env: gym.Env | None = None,
    reference: tuple[float, float] | None = None,
    note: dict[str, Any] | None = None,
    spaces: tuple[gym.Space, gym.Space] | None = None,
    **about: Any,
) -> Path:
    """Write episodes as a Minari dataset, whole or not at all and in bounded memory, and return its folder.

    Log-probabilities of the policy that acted become the infos `action_log_probs` [T] of an episode.

    Args:
        env: what `recover_environment` makes; None: data without an environment.
        eval_env: the same for `recover_environment(eval_env=True)`.
        reference: the returns that score 0 and 1 in `eval_env`.
        note: kept as JSON beside Minari's metadata; `metadata` gives it back.
        spaces: of observations and actions; by default those of `env`, or made from the spec.
        about: further metadata by Minari's names (`algorithm_name`, `author`, `author_email`, `code_permalink`,
            `description`, `requirements`).

    Raises:
        UserError: the id is not valid or exists already, or the disk refuses.
    """
    check_free(dataset_id)
    if spaces is None:
        spaces = (env.observation_space, env.action_space) if isinstance(env, gym.Env) else spaces_of(spec)
    people = {name: {about.pop(name)} for name in ("author", "author_email") if isinstance(about.get(name), str)}
    about |= people | {"dataset_id": dataset_id, "minari_version": minari.__version__}
    if eval_env is not None and eval_env.spec is not None:
        about["eval_env_spec"] = eval_env.spec.to_json()
    if reference is not None:
        about |= {"ref_min_score": reference[0], "ref_max_score": reference[1]}
    env_spec = env.spec if isinstance(env, gym.Env) else env
    target, namespace = dataset_root() / dataset_id, dataset_id.rpartition("/")[0]
    try:
        dataset_root().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=dataset_root(), prefix=".writing-") as temporary:
            folder = Path(temporary) / dataset_id / "data"
            folder.mkdir(parents=True)
            storage = MinariStorage.new(folder, *spaces, env_spec=env_spec)
            _describe(storage, about)
            logged = _fill(storage, spec, spaces, episodes)
            note = {"dt": spec.dt, **(note or {}), "log_probs": logged}
            storage.update_metadata({"offline_cai": json.dumps(note)})
            if namespace and namespace not in list_local_namespaces():
                create_namespace(namespace)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(temporary) / dataset_id, target)
    except OSError as error:
        raise UserError(f"cannot write the dataset {dataset_id!r} to {target}: {error}.") from error
    return target


def _describe(storage: MinariStorage, about: dict[str, Any]) -> None:
    try:
        storage.update_metadata(about)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(f"Minari does not take these metadata: {about}. Mend those of the source.") from error


def check_free(dataset_id: str) -> None:
    """Raise a UserError unless a dataset can be written under this id."""
    check_id(dataset_id)
    target = dataset_root() / dataset_id
    if target.exists():
        raise UserError(
            f"the dataset {dataset_id!r} exists already in {target} and is not overwritten. Remove it with "
            f"`minari delete {dataset_id}`, or take another name or version."
        )


def origin(dataset: minari.MinariDataset) -> dict[str, Any]:
    """Arguments for `write` that make a dataset like this one: its spaces, environments, references and all it says."""
    metadata_ = dataset.storage.metadata
    own = _STORAGE_KEYS | set(inspect.signature(write).parameters)
    about = {name: value for name, value in metadata_.items() if name not in own}
    spaces = (dataset.observation_space, dataset.action_space)
    note = {name: value for name, value in metadata(dataset).items() if name != "fingerprint"}  # of a recipe's own data
    return {**about, "env": dataset.spec.env_spec, "spaces": spaces, "note": note}


def _fill(storage: MinariStorage, spec: Spec, spaces: tuple[gym.Space, gym.Space], episodes: Iterable[Episode]) -> bool:
    """Add the episodes, one after the other; returns whether all of them have log-probabilities."""
    logged = []

    def buffers(interrupt: Interrupt) -> Iterator[EpisodeBuffer]:
        for episode in episodes:
            interrupt.check()
            _require_space(episode)
            logged.append(episode.log_prob is not None)
            yield _buffer(spec, *spaces, episode)

    with Interrupt() as interrupt:
        storage.update_episodes(buffers(interrupt))
    return all(logged)


def _require_space(episode: Episode) -> None:
    """Raise a UserError if the disk has no room for an episode: HDF5 would crash the process instead of raising."""
    numbers = 8 * (np.size(episode.obs) + np.size(episode.action) + 3 * len(episode.reward))
    needed, free = 2 * numbers + MARGIN, shutil.disk_usage(dataset_root()).free
    if free < needed:
        raise UserError(
            f"the disk of {dataset_root()} has {free / 2**20:.0f} MiB left, and {needed / 2**20:.0f} MiB have to be "
            "free while a dataset is written: free some, or set MINARI_DATASETS_PATH to another disk."
        )


def _buffer(spec: Spec, obs_space: gym.Space, action_space: gym.Space, episode: Episode) -> EpisodeBuffer:
    columns = spec.columns(*(leaf.name for leaf in leaves(obs_space)))  # a declared spec has an order of its own
    ends = np.zeros((2, len(episode.reward)), dtype=bool)
    ends[0 if episode.terminal else 1, -1] = True
    return EpisodeBuffer(
        observations=unflatten(obs_space, episode.obs[:, columns]),
        actions=unflatten_action(action_space, episode.action),
        rewards=episode.reward,
        terminations=ends[0],
        truncations=ends[1],
        infos=None if episode.log_prob is None else {LOG_PROB: episode.log_prob},
    )
