import json
from pathlib import Path

import pytest
import torch

from offline_cai import config
from offline_cai.algorithms.bc import BC, BCConfig
from offline_cai.core import Spec
from offline_cai.errors import UserError
from offline_cai.training import checkpoint

FACTS = {"experiment": {}, "training": {}, "source": {"note": 1}}


def save(folder: Path, spec: Spec, step: int = 1, keep: int = 2) -> Path:
    bc = BC(spec, BCConfig(hidden=(4,)))
    export = checkpoint.Export("bc", bc.config, spec, bc.state_dict())
    path = checkpoint.save(folder, step, export, {"model/x": torch.arange(3.0)}, dict(FACTS))
    checkpoint.prune(folder, step, keep, best=None)
    return path


def test_a_checkpoint_is_written_again_only_if_its_source_has_gathered_more(tmp_path: Path, spec: Spec) -> None:
    first = (save(tmp_path, spec, 5) / "manifest.json").stat()
    again = (save(tmp_path, spec, 5) / "manifest.json").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns), (
        "reading it may change its atime alone"
    )
    bc = BC(spec, BCConfig(hidden=(4,)))
    export = checkpoint.Export("bc", bc.config, spec, bc.state_dict())
    path = checkpoint.save(tmp_path, 5, export, {"model/x": torch.arange(3.0)}, FACTS | {"source": {"note": 2}})
    assert checkpoint.source_facts(path) == {"note": 2} and checkpoint.find(path) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"], "nothing is left beside it"


def test_what_a_fallback_left_behind_goes_and_the_whole_ones_stay(tmp_path: Path, spec: Spec) -> None:
    for step in (10, 20):
        save(tmp_path, spec, step)
    (tmp_path / "step-00000020" / "manifest.json").write_text("{")
    save(tmp_path, spec, 12, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000012"]


def test_the_last_ones_are_kept_and_found(tmp_path: Path, spec: Spec) -> None:
    for step in (1, 2, 10):
        save(tmp_path / "checkpoints", spec, step)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000002", "step-00000010"]
    assert checkpoint.find(tmp_path).name == "step-00000010"
    assert checkpoint.find(tmp_path / "checkpoints" / "step-00000002").name == "step-00000002"
    tensors, state = checkpoint.load_state(checkpoint.find(tmp_path))
    assert tensors["model/x"].tolist() == [0, 1, 2] and state == {"step": 10, **FACTS}
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["export/model.safetensors", "export/config.json", "state/training.safetensors"])
def test_a_changed_or_missing_file_is_found_out(tmp_path: Path, spec: Spec, name: str) -> None:
    path = save(tmp_path, spec)
    data = bytearray((path / name).read_bytes())
    data[-2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"differs from what was written"):
        checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(path)


def test_a_manifest_has_to_list_every_file(tmp_path: Path, spec: Spec) -> None:
    path = save(tmp_path, spec)
    one = json.loads((path / "manifest.json").read_text())
    empty, old = json.dumps(one | {"sha256": {}}), json.dumps(one | {"format": 1, "version": "0.0.1"})
    listed = json.dumps(one | {"sha256": list(one["sha256"])})
    for text, word in (
        (empty, "does not list"),
        ("[]", "should hold a JSON object"),
        ("{", "as JSON"),
        (old, "format 1, and this version reads 2: use it with offline_cai 0.0.1, which wrote it"),
        (listed, "is damaged"),
    ):
        (path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=word):
            checkpoint.load(path)


def test_a_half_written_checkpoint_is_none(tmp_path: Path, spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "checkpoints", spec, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"step-00000002.*no space left.*Earlier checkpoints are untouched"):
        save(tmp_path / "checkpoints", spec, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    checkpoint.load(tmp_path)


def rewrite(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change the export's config and make the manifests agree, as someone editing by hand might."""
    data = json.loads((path / "export" / "config.json").read_text())
    change(data)
    (path / "export" / "config.json").write_text(json.dumps(data))
    for folder, names in ((path / "export", ["config.json"]), (path, ["export/config.json", "export/manifest.json"])):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"] |= {name: checkpoint.digest(folder / name) for name in names}
        if manifest.pop("own sha256", None):
            manifest["own sha256"] = checkpoint._own_digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_weights_of_another_shape_or_name_are_named(tmp_path: Path, spec: Spec) -> None:
    path = save(tmp_path, spec)
    rewrite(path, lambda data: data["config"].update(hidden=[5]))
    with pytest.raises(UserError, match=r"'actor.body.weight_0' has shape \(8, 4\).*makes it \(8, 5\)"):
        checkpoint.load(path)
    rewrite(path, lambda data: data["config"].update(hidden=[4, 4]))
    with pytest.raises(UserError, match=r"'actor\..*(missing|shape)"):
        checkpoint.load(path)
    rewrite(path, lambda data: data["config"].update(hiden=[4]))
    with pytest.raises(UserError, match="did you mean 'hidden'"):
        checkpoint.load(path)


def test_an_export_says_what_it_is(tmp_path: Path, spec: Spec) -> None:
    path = save(tmp_path, spec)
    data = json.loads((path / "export" / "config.json").read_text())
    assert data["algorithm"] == "bc" and data["config"] == config.to_dict(BCConfig(hidden=(4,)))
    assert {p.suffix for p in path.rglob("*") if p.is_file()} == {".json", ".safetensors"}, "nothing to execute"
