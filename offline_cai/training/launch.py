"""Starts the processes of one machine; they find each other through torch.distributed's environment variables.

It does what `torchrun` does, but passes on the exit status and what was said, and imports nothing heavy.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from offline_cai.interrupts import Interrupt

GRACE = 5.0
"""Seconds that the others have to end by themselves when one has failed."""
LOST = "another process of this training is gone"


def is_worker() -> bool:
    """Whether this process is one of several that a launcher (this one, torchrun, Accelerate's) started."""
    return "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def tell(error: str) -> None:
    """Say what a user can mend: to the launcher above, which says it once for all, or on stderr."""
    number, path = os.environ.get("RANK", "0"), os.environ.get("OFFLINE_CAI_ERRORS")
    if path is None:
        print(f"error{'' if number == '0' else f' in process {number}'}: {error}", file=sys.stderr)
    else:
        (Path(path) / number).write_text(error)


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `offline-cai ARGUMENTS` in that many processes; gives the exit status of the first that failed, or 0.

    The first process alone writes to the terminal. What others have to say is said when they have ended. Signals are
    passed on to all.
    """
    command = [sys.executable, "-m", "offline_cai", *arguments]
    with tempfile.TemporaryDirectory() as folder, Interrupt() as interrupt:
        shared = {
            "OFFLINE_CAI_ERRORS": folder,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _port(),
        }
        logs = [None if number == 0 else (Path(folder) / f"{number}.log").open("w") for number in range(processes)]
        workers = [
            subprocess.Popen(
                command,
                env=os.environ | {k: str(v) for k, v in (shared | {"RANK": number, "LOCAL_RANK": number}).items()},
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in a terminal reaches the launcher alone, which passes it on once
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            for number, log in enumerate(logs)
        ]
        codes = _wait(workers, interrupt)
        if not interrupt.asked:
            _explain(codes, Path(folder))
    failed = [code for code in codes if code]
    return (128 - failed[0] if failed[0] < 0 else failed[0]) if failed else 0


def _explain(codes: Sequence[int | None], folder: Path) -> None:
    """Say once what went wrong; that others were lost is a consequence, and only said if nothing else is known."""
    told = {
        number: (folder / str(number)).read_text() for number in range(len(codes)) if (folder / str(number)).exists()
    }
    causes = {error: number for number, error in reversed(told.items()) if not error.startswith(LOST)}
    for error, number in causes.items():
        print(f"error{f' in process {number}' if number else ''}: {error}", file=sys.stderr)
    for number, code in enumerate(codes):
        if code is not None and code < 0:
            causes[""] = number
            name = signal.Signals(-code).name
            print(f"error: process {number} of {len(codes)} was ended by {name}, so the others stop.", file=sys.stderr)
        if code == 1 and number and not causes:
            causes[""] = number
            print((folder / f"{number}.log").read_text(), file=sys.stderr, end="")
    for error in list(told.values())[:1] if not causes else []:
        print(f"error: {error}", file=sys.stderr)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_with_parent() -> None:
    """Linux: send this process SIGTERM when its parent dies, however it dies (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(workers: Sequence[subprocess.Popen], interrupt: Interrupt) -> list[int | None]:
    """Wait for all, and end those that outlive a failed one by GRACE; gives the statuses, None for who had to be ended.

    A signal is passed on; a second one ends them all.
    """
    passed_on, deadline = False, float("inf")
    try:
        while None in (codes := [worker.poll() for worker in workers]) and time.monotonic() < deadline:
            if interrupt.asked and not passed_on:
                passed_on = True
                for worker in workers:
                    worker.send_signal(interrupt.asked)
            if deadline == float("inf") and any(codes):
                deadline = time.monotonic() + GRACE
            time.sleep(0.02)
        return codes
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
