"""`offline-cai data`: each command once as people see it and once as programs read it, and its mistakes."""

import json
from pathlib import Path

import pytest

from offline_cai import cli
from offline_cai.data import arrays
from offline_cai.data.trajectories import Trajectories


@pytest.fixture
def own(store: Trajectories, tmp_path: Path) -> str:
    """A file of own arrays: the common store's three episodes."""
    return str(arrays.write(tmp_path / "own.npz", store))


def test_list(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == [dataset, "minari", "200", "4000"] and "/datasets/" in line for line in lines), lines
    assert any("umaze-v0" in line and "offline-cai collect pointmaze-umaze" in line for line in lines)
    assert cli.main(["data", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[dataset]["steps"] == 4000
