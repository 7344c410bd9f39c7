import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from offline_cai import cli

COMMANDS = ["collect", "data", "train", "plan", "evaluate", "scoreboard", "report", "demo"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_reads_well_and_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom offline_cai import cli\n"
        f"try: cli.main({[command, '--help'] if command else ['--help']!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'matplotlib', 'gymnasium', 'minari', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"usage: offline-cai {command}".strip() in result.stdout
    assert all(len(line) <= 120 for line in result.stdout.splitlines())
    if not command:
        assert all(name in result.stdout for name in COMMANDS)


def test_train_help_lists_the_fields_of_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "debug-diffuser", "--help", "--training.steps", "7"]) == 0
    said = capsys.readouterr().out
    for line in ("--training.steps 7", "--model.planner.tracker.kp 10.0", "Optimiser steps.", "--model.stride 8"):
        assert line in said, line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], r"invalid choice: 'frobnicate'"),
        (["plan"], r"arguments are required: RUN"),
        (
            ["train", "debug-difuser"],
            r"no file and no recipe 'debug-difuser' in configs/; did you mean 'debug-diffuser'",
        ),
        (["train", "debug-diffuser", "--training.stepz", "3"], r"unknown key 'stepz'; did you mean 'steps'"),
        (
            ["train", "debug-diffuser", "--dataset", "offline-cai/pointmaze/debug-v7"],
            r"no dataset .*debug-v7.*debug-v0",
        ),
        (["train"], r"name a CONFIG"),
        (["train", "debug-diffuser", "--resume", "x"], r"leave CONFIG and --output out"),
        (["train", "debug-diffuser", "--processes", "0"], r"--processes is 0; it has to be at least 1"),
        (["train", "debug-diffuser", "--resume"], r"--resume after a CONFIG needs --output"),
        (["train", "--resume", "nowhere"], r"nowhere holds no config.yaml"),
        (["train", "debug-diffuser", "--training.steps"], r"--training.steps needs a value"),
        (["train", "debug-diffuser", "extra"], r"unrecognized arguments: extra; see"),
        (["plan", "nowhere"], r"nowhere holds no checkpoint"),
        (["report", "nowhere", "--cuont", "3"], r"unrecognized arguments: --cuont 3; see"),
        (["collect", "debug-umaze", "--steps", "7"], r"steps \(7\) has to be a positive multiple"),
        (
            ["collect", "debug-umaze", "--behaviour.kq", "1", "--id", "aa/bb-v0", "--steps", "20"],
            r"unknown key 'kq'; did you mean 'kp'",
        ),
        (["collect", "debug-umaze", "--id", "no id", "--steps", "20"], r"'no id' is no Minari dataset id"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from offline_cai.data import minari

    monkeypatch.setattr(minari, "online", lambda *args: False)
    assert cli.main([*arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert re.search(words, error), error


def test_debug_shows_the_traceback() -> None:
    command = [sys.executable, "-m", "offline_cai", "train", "--debug"]  # a mistake before anything heavy is imported
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_results_as_json(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--json", "--output", str(tmp_path / "e"), "--episodes=2", "--references", "[]"]
    assert cli.main(["evaluate", str(run), *flags]) == 0
    assert json.loads(capfd.readouterr().out)["results"]["planner"]["n"] == 2


def test_ctrl_c_says_how_to_resume_and_exits_130(dataset: str, tmp_path: Path) -> None:
    import os
    import signal
    import time

    target = tmp_path / "run"
    command = [sys.executable, "-m", "offline_cai", "train", "debug-diffuser", "--output", str(target), "--quiet"]
    process = subprocess.Popen(
        [*command, "--training.steps", "100000", "--training.log_every", "1"], stderr=subprocess.PIPE, text=True
    )
    while not (target / "metrics.jsonl").exists() or not (target / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert re.search(
        rf"interrupted: stopped at step \d+ of 100000. Resume with: offline-cai train --resume {target}\n", error
    )
    steps = len((target / "metrics.jsonl").read_text().splitlines())
    assert cli.main(["train", "--resume", str(target), "--quiet", "--training.steps", str(steps + 2)]) == 0
    assert len((target / "metrics.jsonl").read_text().splitlines()) >= steps
