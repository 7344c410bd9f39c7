"""The wheel, installed into an environment of its own, in an empty folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git tracks or would track, as a clean clone has it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, files):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_it_holds_the_package_and_its_recipes_and_nothing_else(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for path in (REPOSITORY / "offline_cai").rglob("*"):
        if path.suffix in (".py", ".json", ".typed"):
            assert str(path.relative_to(REPOSITORY)) in held
    for kind in ("configs", "datasets", "eval", "eval/scoreboards"):
        for path in (REPOSITORY / kind).glob("*.yaml"):
            assert f"offline_cai/recipes/{kind}/{path.name}" in held
    for path in (REPOSITORY / "datasets" / "actors").iterdir():
        assert f"offline_cai/recipes/datasets/actors/{path.name}" in held
    assert any(name.endswith("dist-info/licenses/datasets/actors/LICENSE") for name in held)
    assert {name.split("/")[0].split("-")[0] for name in held} == {"offline_cai"}, "no top-level datasets or tests"


def test_it_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Its own environment borrows only the dependencies of this one, not the package."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    target = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    zipfile.ZipFile(wheel).extractall(target)
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(("offline_cai", "__editable__")) and path.suffix != ".pth":
            (borrowed / path.name).symlink_to(path)
    (target / "borrowed.pth").write_text(str(borrowed))
    empty = tmp_path / "empty"
    empty.mkdir()
    env = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path / "data"), "OFFLINE_CAI_CACHE": str(tmp_path / "cache")}

    def call(*arguments: str) -> str:
        command = [str(venv / "bin" / "python"), "-m", "offline_cai", *arguments]
        result = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    where = [str(venv / "bin" / "python"), "-c", "import offline_cai; print(offline_cai.__file__)"]
    assert str(venv) in subprocess.run(where, cwd=empty, env=env, capture_output=True, text=True).stdout
    assert "offline-cai" in call("--help")
    assert "score: planner" in call("demo", "debug-diffuser", "--quiet", "--output", "run")
    assert (empty / "run" / "report.html").is_file()
