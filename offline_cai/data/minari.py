"""Minari datasets in and out. A dataset is converted once to the trajectory store, which is what training reads."""

import hashlib
import json
import os
import re
import socket
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces

from offline_cai import config
from offline_cai.core import Episode, Spec
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import UserError, did_you_mean
from offline_cai.spaces import flatten, spec_of, unflatten

_ID = re.compile(r"([-\w]+/)*[-\w]+-v\d+")


def dataset_root() -> Path:
    """Where Minari keeps its datasets: MINARI_DATASETS_PATH, or ~/.minari/datasets."""
    return Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets")


def cache_root() -> Path:
    """Where converted stores are kept: OFFLINE_CAI_CACHE, or ~/.cache/offline_cai. Safe to delete."""
    return Path(os.environ.get("OFFLINE_CAI_CACHE") or Path.home() / ".cache" / "offline_cai")


def local_ids() -> list[str]:
    root = dataset_root()
    return sorted(str(path.parent.relative_to(root)) for path in root.glob("**/*-v*/data"))


def exists(dataset_id: str) -> bool:
    return (dataset_root() / dataset_id / "data").is_dir()


def load(dataset_id: str) -> minari.MinariDataset:
    """A local Minari dataset.

    Raises:
        UserError: it is not there (the nearest ids, and how to collect or download it), or its files are damaged.
    """
    if not exists(dataset_id):
        raise UserError(_missing(dataset_id))
    try:
        return minari.load_dataset(dataset_id)
    except Exception as error:  # Minari raises OSError, KeyError, JSONDecodeError, AssertionError and others
        raise _damaged(dataset_id, error) from error


def _damaged(dataset_id: str, error: Exception, episode: int | None = None) -> UserError:
    where = "" if episode is None else f", episode {episode}"
    return UserError(
        f"the Minari dataset {dataset_id!r} in {dataset_root() / dataset_id}{where} cannot be read "
        f"({type(error).__name__}: {' '.join(str(error).split()) or 'no further word'}). "
        f"Its files are damaged: remove it with `minari delete {dataset_id}` and collect or download it again."
    )


def _missing(dataset_id: str) -> str:
    if not _ID.fullmatch(dataset_id):
        return f"{dataset_id!r} is no Minari dataset id: they read namespace/environment/name-v0."
    recipes = {config.read(config.find(name, "datasets")).get("id"): name for name in config.names("datasets")}
    if dataset_id in recipes:
        how = f"Collect it with `offline-cai collect {recipes[dataset_id]}`."
    else:
        known = [*local_ids(), *(str(name) for name in recipes if name)]
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


def trajectories(dataset_id: str) -> Trajectories:
    """The store of a Minari dataset: converted on first use, mapped afterwards.

    Raises:
        UserError: the dataset is missing or damaged (dataset, episode, field and mend are named), or its spaces are of
            a kind that this version does not train on.
    """
    dataset = load(dataset_id)
    path = cache_root() / "stores" / f"{dataset_id.replace('/', '--')}-{fingerprint(dataset_id)}"
    if not path.exists():
        spec = spec_of(dataset.observation_space, dataset.action_space, metadata(dataset).get("dt"))
        where = f"dataset {dataset_id!r} ({dataset_root() / dataset_id})"
        store = Trajectories.from_episodes(spec, _episodes(dataset, dataset_id, spec), where)
        store.save(path, {"dataset": dataset_id, "fingerprint": fingerprint(dataset_id)})
    return Trajectories.open(path)


def fingerprint(dataset_id: str) -> str:
    """A hash of the names, sizes and times of a dataset's files: changes when they do, costs the same for any size."""
    folder = dataset_root() / dataset_id / "data"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]


def metadata(dataset: minari.MinariDataset) -> dict[str, Any]:
    """What `write` noted beside Minari's own metadata; empty for a dataset that others made."""
    note = dataset.storage.metadata.get("offline_cai", "{}")
    return json.loads(note) if isinstance(note, str) else {}


def _episodes(dataset: minari.MinariDataset, dataset_id: str, spec: Spec) -> Iterator[Episode]:
    number, iterator = -1, iter(dataset.iterate_episodes())
    while True:
        try:
            episode = next(iterator, None)
            if episode is None:
                return
            number += 1
            obs = flatten(spec, episode.observations)
            action = np.asarray(episode.actions, dtype=np.float64).reshape(len(episode.actions), -1)
            ends = np.flatnonzero(episode.terminations | episode.truncations)
        except Exception as error:
            raise _damaged(dataset_id, error, number + 1) from error
        if len(ends) and ends[0] < len(episode.rewards) - 1:
            raise UserError(
                f"dataset {dataset_id!r}, episode {number}: an end is flagged at step {ends[0]}, but the episode goes "
                f"on to step {len(episode.rewards) - 1}. Split it there."
            )
        terminal = bool(len(ends) and episode.terminations[-1])
        yield Episode(obs, action, np.asarray(episode.rewards, dtype=np.float64), terminal)


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
    if not _ID.fullmatch(dataset_id):
        raise UserError(f"{dataset_id!r} is no Minari dataset id: they read namespace/environment/name-v0.")
    target = dataset_root() / dataset_id
    if target.exists():
        raise UserError(
            f"the dataset {dataset_id!r} exists already in {target} and is not overwritten. Remove it with "
            f"`minari delete {dataset_id}`, or collect under another name or version."
        )
    buffers = [_buffer(spec, env.observation_space, episode) for episode in episodes]
    low, high = reference or (None, None)
    namespace = dataset_id.rpartition("/")[0]
    try:
        dataset_root().mkdir(parents=True, exist_ok=True)
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


def _buffer(spec: Spec, space: gym.Space, episode: Episode) -> EpisodeBuffer:
    ends = np.zeros((2, len(episode.reward)), dtype=bool)
    ends[0 if episode.terminal else 1, -1] = True
    return EpisodeBuffer(
        observations=unflatten(spec, space, episode.obs),
        actions=episode.action.astype(np.float32),
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
