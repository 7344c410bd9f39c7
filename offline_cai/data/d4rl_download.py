"""D4RL's files by name: fetched once, whole or not at all, and verified before each later use."""

import hashlib
import http.client
import json
import os
import tempfile
import urllib.error
import urllib.request
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import h5py
from tqdm import tqdm

from offline_cai.data.cache import cache_root
from offline_cai.errors import UserError, did_you_mean

CONNECT_SECONDS, READ_SECONDS = 5.0, 60.0


class Entry(NamedTuple):
    """Where a dataset is, and the time limit of the environment that D4RL registers for it, in steps."""

    url: str
    max_episode_steps: int


@cache
def table() -> dict[str, Entry]:
    """D4RL's datasets by name; the file names their source."""
    rows = json.loads(files("offline_cai.data").joinpath("d4rl_urls.json").read_text())["table"]
    return {name: Entry(**row) for name, row in rows.items()}


def entry(name: str) -> Entry:
    """The entry of a dataset such as "hopper-medium-v2".

    Raises:
        UserError: D4RL has no dataset of that name; the nearest are named.
    """
    if name not in table():
        raise UserError(f"D4RL has no dataset {name!r}; {did_you_mean(name, table())}")
    return table()[name]


def name_of(file: Path) -> str | None:
    """The dataset that a file of this name holds, by its own name or by the one it has on D4RL's server."""
    if file.stem in table():
        return file.stem
    return min((name for name, at in table().items() if at.url.endswith(f"/{file.name}")), key=len, default=None)


def file_of(name: str) -> Path:
    """Where the file of a dataset is kept, or can be put by hand."""
    return cache_root() / "d4rl" / f"{name}.hdf5"


def download(name: str) -> Path:
    """The file of a D4RL dataset: fetched if it is not in the cache, else verified against the hash noted beside it.

    The hash is noted when the file is first seen, after a download or put there by hand.

    Raises:
        UserError: no such dataset, no network (at once, with the URL and the place for the file), a refusal by the
            server, fewer bytes than it promised, something that is no HDF5, or a file that has changed since.
    """
    url, file = entry(name).url, file_of(name)
    note = file.with_suffix(".json")
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            digest = _fetch(name, url, file)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"cannot download {name!r} from {url} ({_reason(error)}). Try again with a network, or put the file "
                f"there by hand as {file}."
            ) from error
        _write_note(note, url, digest, file)
        return file
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if not note.exists():
        _check_hdf5(file, f"{file}")
        _write_note(note, url, digest, file)
    elif digest != _noted(note):
        raise UserError(
            f"{file} is not the file that was downloaded from {url}: its sha256 differs from the one in {note.name}. "
            "Remove both to download it again."
        )
    return file


def _fetch(name: str, url: str, file: Path) -> str:
    """Download to a temporary name beside the file, check, rename; the sha256 of what was written."""
    hash_, opener = hashlib.sha256(), urllib.request.build_opener(_Http, _Https)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as folder:
        temporary = Path(folder) / file.name
        with opener.open(url, timeout=CONNECT_SECONDS) as reply, temporary.open("wb") as out:
            promised = int(reply.headers["Content-Length"]) if reply.headers["Content-Length"] else None
            with tqdm(total=promised, unit="B", unit_scale=True, desc=name, disable=None) as bar:
                while chunk := reply.read(1 << 20):
                    out.write(chunk)
                    hash_.update(chunk)
                    bar.update(len(chunk))
            got = out.tell()
            out.flush()
            os.fsync(out.fileno())
        if promised is not None and got != promised:
            raise UserError(
                f"the download of {name!r} from {url} broke off after {got:,} of {promised:,} bytes. Try again, or put "
                f"the file there by hand as {file}."
            )
        _check_hdf5(temporary, f"what {url} sends for {name!r}")
        os.replace(temporary, file)
    return hash_.hexdigest()


def _check_hdf5(file: Path, what: str) -> None:
    try:
        h5py.File(file, "r").close()
    except OSError as error:
        raise UserError(
            f"{what} is no whole HDF5 file ({error}). Put a good copy there by hand, or download again later."
        ) from error


def _write_note(note: Path, url: str, digest: str, file: Path) -> None:
    note.write_text(json.dumps({"url": url, "bytes": file.stat().st_size, "sha256": digest}, indent=1))


def _noted(note: Path) -> str | None:
    try:
        return json.loads(note.read_text())["sha256"]
    except (ValueError, KeyError, TypeError):
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"no connection: {error.reason}"
    return f"{type(error).__name__}: {error}"


def _patient(base: type[http.client.HTTPConnection]) -> Any:
    """A connection that gives up early while connecting, so that no network is said at once, but reads slow servers."""

    class Connection(base):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(READ_SECONDS)

    return Connection


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_patient(http.client.HTTPConnection), req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_patient(http.client.HTTPSConnection), req)
