"""Exports by themselves; tests/training/test_checkpoint.py has those inside checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from offline_cai import export
from offline_cai.algorithms.bc import BC, BCConfig
from offline_cai.algorithms.diffuser import Diffuser
from offline_cai.core import Spec
from offline_cai.errors import UserError


def saved(spec: Spec, folder: Path) -> BC:
    torch.manual_seed(0)
    bc = BC(spec, BCConfig(hidden=(4,)))
    bc.save_pretrained(folder)
    return bc


def test_what_is_saved_is_what_is_loaded(spec: Spec, tmp_path: Path) -> None:
    bc = saved(spec, tmp_path / "bc")
    loaded = BC.from_pretrained(tmp_path / "bc")
    assert loaded.config == bc.config and loaded.spec == spec and not loaded.training
    assert all(torch.equal(bc.state_dict()[name], tensor) for name, tensor in loaded.state_dict().items())
    assert {path.name for path in (tmp_path / "bc").iterdir()} == {*export.FILES, "manifest.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["bc"], "nothing is left beside it"


def test_a_run_and_its_checkpoints_hold_exports(run: Path) -> None:
    last = sorted((run / "checkpoints").iterdir())[-1]
    for path in (run, last, last / "export"):
        assert export.find(path) == last / "export"
    assert Diffuser.from_pretrained(run).config.levels == 8
    with pytest.raises(UserError, match="holds a 'diffuser', not a 'bc'"):
        BC.from_pretrained(run)


@pytest.mark.parametrize("name", [*export.FILES, "manifest.json"])
def test_every_flipped_bit_and_missing_file_is_found(spec: Spec, tmp_path: Path, name: str) -> None:
    saved(spec, tmp_path / "bc")
    file = tmp_path / "bc" / name
    good = file.read_bytes()
    for at in range(0, len(good), max(1, len(good) // 20)):
        file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        with pytest.raises(UserError, match=r"damaged|has format"):
            BC.from_pretrained(tmp_path / "bc")
    file.unlink()
    with pytest.raises(UserError, match=r"damaged|holds no export"):
        BC.from_pretrained(tmp_path / "bc")


def test_missing_and_unknown_tensors_are_named(spec: Spec, tmp_path: Path) -> None:
    bc = saved(spec, tmp_path / "bc")
    data = json.loads((tmp_path / "bc" / "config.json").read_text())
    weights = bc.state_dict()
    for number, (tensors, words) in enumerate(
        (
            ({name: t for name, t in weights.items() if name != "actor.body.bias_1"}, "'actor.body.bias_1' is missing"),
            ({**weights, "extra": torch.zeros(1)}, "'extra' is unknown"),
        )
    ):
        export.write(tmp_path / str(number), data, tensors)
        with pytest.raises(UserError, match=words):
            BC.from_pretrained(tmp_path / str(number))


def test_nothing_is_overwritten_and_places_that_hold_none_are_named(spec: Spec, tmp_path: Path) -> None:
    saved(spec, tmp_path / "bc")
    with pytest.raises(UserError, match="exists already"):
        saved(spec, tmp_path / "bc")
    with pytest.raises(UserError, match="cannot write the export"):
        saved(spec, tmp_path / "bc" / "config.json" / "x")
    with pytest.raises(UserError, match="holds no export"):
        BC.from_pretrained(tmp_path)
