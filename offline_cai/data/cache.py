"""Where converted stores live: each source is converted once, and again when its files change."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from offline_cai.core import Spec
from offline_cai.data.intake import Reading
from offline_cai.data.trajectories import Trajectories
from offline_cai.errors import Notice, UserError


def cache_root() -> Path:
    """OFFLINE_CAI_CACHE, or ~/.cache/offline_cai. Safe to delete."""
    return Path(os.environ.get("OFFLINE_CAI_CACHE") or Path.home() / ".cache" / "offline_cai")


@contextmanager
def cache_at(folder: str | Path) -> Iterator[None]:
    """Another cache for a while: what is read inside is converted anew."""
    before = os.environ.get("OFFLINE_CAI_CACHE")
    os.environ["OFFLINE_CAI_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("OFFLINE_CAI_CACHE")
        if before is not None:
            os.environ["OFFLINE_CAI_CACHE"] = before


def fingerprint(path: Path) -> str:
    """A hash of where a file is, or the files below a folder, of their sizes and times; costs the same for any size."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    state = [(str(file.relative_to(path.parent)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([str(path.resolve()), state]).encode()).hexdigest()[:16]


def converted(
    name: str, source: Path, read: Callable[[], tuple[Spec, Iterable[Reading]]], repair: bool = False
) -> Trajectories:
    """The store of a source: opened if it was converted before, else read, checked and kept.

    Args:
        name: names the store's folder and the source in errors; slashes are fine.
        source: file or folder, whose fingerprint decides whether it has to be read again.
        read: the spec and the episodes, one after the other.
        repair: leave damaged episodes out. The store is another one then: who asks without gets the error, as before.

    Raises:
        UserError: a damaged episode, by name; nothing is kept then.
    """
    key = fingerprint(source)
    path = cache_root() / "stores" / f"{name.replace('/', '--')}-{key}{'-repaired' if repair else ''}"
    if path.exists():
        try:
            return Trajectories.open(path)
        except UserError as error:  # a damaged store, or one of an older format, is only a cache
            warnings.warn(f"{error} That is done now.", Notice, stacklevel=3)
        shutil.rmtree(path)
    if not path.exists():
        spec, episodes = read()
        about = {"dataset": name, "fingerprint": key}
        Trajectories.write(path, spec, episodes, f"dataset {name!r} ({source})", about, repair)
    return Trajectories.open(path)
