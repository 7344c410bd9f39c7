"""The launcher, with workers that are quick: a script in place of Python behaves as its argument says."""

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from offline_cai.training import launch

WORKER = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
rank, tell = int(os.environ["RANK"]), pathlib.Path(os.environ["OFFLINE_CAI_ERRORS"], os.environ["RANK"]).write_text
assert sys.argv[1:3] == ["-m", "offline_cai"] and os.environ["WORLD_SIZE"] == "2" and os.environ["MASTER_PORT"]
kind = sys.argv[3]
if kind == "same":
    tell("no such dataset.")
    sys.exit(2)
if kind == "second":
    while rank == 0 and not pathlib.Path(os.environ["OFFLINE_CAI_ERRORS"], "1").exists():
        time.sleep(0.01)  # on a busy machine the other, which is the cause, may take longer than GRACE to begin
    tell("{launch.LOST} (reset)." if rank == 0 else "its worker died.")
    sys.exit(2)
if kind == "killed":
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
if kind == "broken":
    if rank == 1:
        print("Traceback: a bug", file=sys.stderr)
    sys.exit(rank)
if kind == "stop":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pathlib.Path(sys.argv[4], str(rank)).touch()
    time.sleep(600)
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    worker = tmp_path / "worker"
    worker.write_text(WORKER)
    worker.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(worker))
    monkeypatch.setattr(launch, "GRACE", 1.0)
    return lambda *words: (launch.launch(2, words), capfd.readouterr().err)


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("well", 0, ""),
        ("same", 2, "error: no such dataset.\n"),
        ("second", 2, "error in process 1: its worker died.\n"),
        ("killed", 137, "error: process 1 of 2 was ended by SIGKILL, so the others stop.\n"),
        ("broken", 1, "Traceback: a bug\n"),
    ],
)
def test_what_went_wrong_is_said_once(kind: str, status: int, said: str, start) -> None:  # type: ignore[no-untyped-def]
    assert start(kind) == (status, said)


def test_a_signal_is_passed_on(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def stop() -> None:
        while not ((tmp_path / "0").exists() and (tmp_path / "1").exists()):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert start("stop", str(tmp_path)) == (143, "")
    thread.join()


def test_who_is_alone_speaks_for_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("OFFLINE_CAI_ERRORS", raising=False)
    launch.tell("a.")
    monkeypatch.setenv("RANK", "3")
    launch.tell("b.")
    assert capsys.readouterr().err == "error: a.\nerror in process 3: b.\n" and not launch.is_first()
