"""The folder of a run: one process at a time writes to it, and nothing in it is overwritten by a slip."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offline_cai import config
from offline_cai.errors import UserError
from offline_cai.training import checkpoint


def is_run(output: Path) -> bool:
    return (output / "config.yaml").is_file()


def require_new(output: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        UserError: says what it found: a run and how far it is, or other files.
    """
    if not output.exists() or (output.is_dir() and {path.name for path in output.iterdir()} <= {".lock"}):
        return
    if not is_run(output):
        raise UserError(f"the output folder {output} is not empty and is not overwritten: name another with --output.")
    data, saved = config.read(output / "config.yaml"), checkpoint.checkpoints(output / "checkpoints")
    done = int(saved[-1].name.removeprefix("step-")) if saved else 0
    raise UserError(
        f"{output} holds a run of {data.get('algorithm')} with {done} of {data.get('training', {}).get('steps')} steps "
        f"done, and is not overwritten: go on with it (offline-cai train --resume {output}), or name another --output."
    )


@contextmanager
def locked(output: Path, main: bool) -> Iterator[None]:
    """The folder, locked while this process trains in it; the lock ends with the process, however it ends.

    Raises:
        UserError: another process trains into it; names it.
    """
    if not main:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"another process is training into {output} ({file.read().strip() or 'it does not say which'}): wait "
                "for it, stop it, or name another --output."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
