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

from offline_cai.interrupts import Interrupt

GRACE = 5.0
"""Seconds that the others have to end by themselves when one has failed."""


def is_worker() -> bool:
    """Whether this process is one of several that a launcher (this one, torchrun, Accelerate's) started."""
    return "WORLD_SIZE" in os.environ


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `offline-cai ARGUMENTS` in that many processes; gives the exit status of the first that failed, or 0.

    The first process speaks for all. What another says is shown if it alone failed. Signals are passed on to all.
    """
    command = [sys.executable, "-m", "offline_cai", *arguments]
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(),
    }
    said = [None if number == 0 else tempfile.TemporaryFile("w+") for number in range(processes)]  # noqa: SIM115
    with Interrupt() as interrupt:
        workers = [
            subprocess.Popen(
                command,
                env=os.environ | {k: str(v) for k, v in (shared | {"RANK": number, "LOCAL_RANK": number}).items()},
                stdout=None if number == 0 else subprocess.DEVNULL,
                stderr=said[number],
                start_new_session=True,  # Ctrl-C in a terminal reaches the launcher alone, which passes it on once
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
            for number in range(processes)
        ]
        failed = _wait(workers, interrupt)
    if failed is None:
        return 0
    first, status = failed, workers[failed].returncode
    text = said[first]
    if text is not None and not interrupt.asked:
        text.seek(0)
        print(text.read(), file=sys.stderr, end="")
    if status < 0 and not interrupt.asked:
        name = signal.Signals(-status).name
        print(f"error: process {first} of {processes} was ended by {name}; the others were stopped.", file=sys.stderr)
    return 128 - status if status < 0 else status


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end_with_parent() -> None:
    """Linux: send this process SIGTERM when its parent dies, however it dies (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait(workers: Sequence[subprocess.Popen], interrupt: Interrupt) -> int | None:
    """Wait for all; gives the number of the first that failed. A signal is passed on; a second one ends them all."""
    passed_on, deadline, failed = False, float("inf"), None
    try:
        while any(worker.poll() is None for worker in workers):
            if interrupt.asked and not passed_on:
                passed_on = True
                for worker in workers:
                    worker.send_signal(interrupt.asked)
            if failed is None:
                failed = next((i for i, worker in enumerate(workers) if worker.returncode not in (None, 0)), None)
                deadline = float("inf") if failed is None else time.monotonic() + GRACE
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()
    codes = [worker.returncode for worker in workers]
    return failed if failed is not None else next((i for i, code in enumerate(codes) if code), None)
