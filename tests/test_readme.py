"""The README's commands and code run as written, on recipes that take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from offline_cai import cli

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
SHORT = {
    "planner-pointmaze-umaze": "debug-planner",
    "bc-pointmaze-umaze": "debug-bc",
    "offline-cai/pointmaze/umaze-v0": "offline-cai/pointmaze/debug-v0",
    "pointmaze-umaze": "debug-umaze",
    "--training.steps 2000": "--training.steps 10",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def short(line: str) -> str:
    for name, replacement in SHORT.items():
        line = line.replace(name, replacement)
    return line


def test_the_step_by_step_commands_and_the_code_run_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our own commands run in this process, where all that they import is there already."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.setenv("OFFLINE_CAI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def run(command: list[str]) -> str:
        if command[0] == "offline-cai":
            assert cli.main(command[1:]) == 0, f"{command}: {capsys.readouterr().err[-2000:]}"
            return capsys.readouterr().out
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}: {result.stderr[-2000:]}"
        return result.stdout

    lines = [line for block in blocks("bash") for line in block.splitlines()]
    steps = [short(line) for line in lines if line.startswith(("offline-cai", "minari"))]
    assert len(steps) >= 8, "the README lost its commands"
    said = [run(step.split()) for step in steps]
    assert any("score: planner" in text for text in said) and (tmp_path / "runs/umaze/report.html").is_file()
    assert [run([sys.executable, "-c", code]) for code in blocks("python")] == ["(2, 2)\n", "2 99\n"]


def test_the_two_commands_exist_and_install_from_the_constraints() -> None:
    two = [line for line in blocks("bash")[0].splitlines() if line]
    assert two == ["make demo", "make test"]
    for line in two:
        plan = subprocess.run([*line.split(), "-n", "-B"], cwd=REPOSITORY, capture_output=True, text=True).stdout
        assert "--constraint constraints.txt" in plan and "-m venv .venv" in plan
        assert ("offline-cai demo" if "demo" in line else "pytest") in plan


@pytest.mark.parametrize(
    "name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "Makefile"]
)
def test_the_files_of_a_project_that_people_join_are_there(name: str) -> None:
    assert (REPOSITORY / name).stat().st_size > 500


def test_the_map_of_the_code_names_every_module() -> None:
    text = (REPOSITORY / "ARCHITECTURE.md").read_text()
    for path in (REPOSITORY / "offline_cai").rglob("*.py"):
        if path.stem not in ("__init__", "__main__") and path.parent.name not in ("algorithms", "inference"):
            assert path.stem in text, f"{path.relative_to(REPOSITORY)} is not in ARCHITECTURE.md"
