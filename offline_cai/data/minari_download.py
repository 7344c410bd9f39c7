"""Minari's public datasets by their ids: fetched by Minari itself, whole or not at all."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import minari as real_minari
from minari.dataset.minari_storage import METADATA_FILE_NAME

from offline_cai.data import minari
from offline_cai.errors import UserError

NAMESPACE = "namespace_metadata.json"


def download(name: str) -> str:
    """Fetch a dataset, and those that it combines, and return its id. One that is here already is kept.

    Args:
        name: an id such as "D4RL/door/human-v2", asked for at MINARI_REMOTE or Minari's own place, or with its remote,
            "hf://farama-minari/D4RL/door/human-v2" or "gcp://BUCKET/...".

    Raises:
        UserError: no such id, remote or dataset, no network (at once), a package that the remote needs, a refusal, or
            the disk refuses; nothing is left behind then.
    """
    remote, dataset_id = minari.split_remote(name)
    minari.check_id(dataset_id)
    remote = remote or os.environ.get("MINARI_REMOTE") or minari.DEFAULT_REMOTE
    _check_remote(remote)
    if minari.exists(dataset_id):
        return dataset_id
    if not minari.online(remote):
        raise UserError(f"cannot download {name!r}: there is no network here, or its server does not answer.")
    root = minari.dataset_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".downloading-") as folder:
            said = io.StringIO()  # Minari names the temporary folder; bars go to stderr
            with _environment(MINARI_DATASETS_PATH=folder, MINARI_REMOTE=remote), redirect_stdout(said):
                _fetch(name, dataset_id)
            _move(Path(folder), root)
    except OSError as error:
        raise UserError(f"cannot keep the dataset {dataset_id!r} in {root}: {error}.") from error
    return dataset_id


def _check_remote(remote: str) -> None:
    scheme, separator, owner = remote.partition("://")
    if scheme not in ("hf", "gcp") or not separator or not owner:
        raise UserError(f"{remote!r} is no remote of Minari's: they read hf://OWNER or gcp://BUCKET (MINARI_REMOTE).")


def _fetch(name: str, dataset_id: str) -> None:
    try:
        real_minari.download_dataset(dataset_id)
    except (ImportError, ValueError) as error:  # a package that is missing, an unknown dataset or version, in words
        raise UserError(f"cannot download {name!r}: {' '.join(str(error).split())}") from error
    except Exception as error:  # each remote raises errors of its own for a refusal or a broken connection
        raise UserError(
            f"the download of {name!r} broke off ({type(error).__name__}: {' '.join(str(error).split())}). Try again."
        ) from error


def _move(source: Path, root: Path) -> None:
    """Datasets and namespaces to where they belong; what is there already stays."""
    datasets = [data.parent.parent for data in source.rglob(f"data/{METADATA_FILE_NAME}")]
    for path in (*datasets, *source.rglob(NAMESPACE)):
        target = root / path.relative_to(source)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Minari reads its root and its remote from the environment at each call."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
