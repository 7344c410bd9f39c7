"""Checkpoints: an export to act with and a state to resume from, as safetensors and JSON. Nothing is executed on load.

    checkpoints/step-00004000/manifest.json                                sha256 of every file below
                              export/config.json  model.safetensors        averaged weights and normalisers
                              state/state.json  training.safetensors       raw weights, optimisers, average

A checkpoint is written under a temporary name, flushed to the disk and then renamed: it is there whole or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline_cai import algorithms, config
from offline_cai.core import Algorithm, Spec
from offline_cai.errors import UserError
from offline_cai.files import read_json

FORMAT = 1
FILES = {"export/config.json", "export/model.safetensors", "state/state.json", "state/training.safetensors"}


class Export(NamedTuple):
    """What it takes to act: the algorithm's name, what it is built from, and its weights."""

    algorithm: str
    config: Any
    spec: Spec
    weights: Mapping[str, Tensor]


def save(folder: Path, step: int, export: Export, tensors: Mapping[str, Tensor], state: Any, keep: int) -> Path:
    """Write the checkpoint of `step` into `folder`, then remove all but the last `keep`.

    Args:
        export: what it takes to act.
        tensors: what a resume needs besides: raw weights, optimiser moments.
        state: JSON that goes with them.

    Raises:
        UserError: the disk refuses; earlier checkpoints are untouched.
    """
    target, temporary = folder / f"step-{step:08d}", folder / f".writing-step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _write_export(temporary / "export", export)
        (temporary / "state").mkdir()
        save_file(_savable(tensors), temporary / "state" / "training.safetensors")
        (temporary / "state" / "state.json").write_text(json.dumps({"step": step, **state}))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(temporary)): _digest(path) for path in files}
        (temporary / "manifest.json").write_text(json.dumps({"format": FORMAT, "sha256": manifest}, indent=1))
        for path in (*files, temporary / "manifest.json"):
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {target}: {error}. Earlier checkpoints are untouched.") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _write_export(folder: Path, export: Export) -> None:
    folder.mkdir(parents=True)
    save_file(_savable(export.weights), folder / "model.safetensors")
    data = {"algorithm": export.algorithm, "config": config.to_dict(export.config), "spec": export.spec.to_json()}
    (folder / "config.json").write_text(json.dumps(data, indent=1))


def _savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading -------------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "manifest.json").is_file())


def find(path: Path | str) -> Path:
    """The checkpoint that a user means: one by its folder, or the last of a run.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return path
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint: name a run's folder (the one with config.yaml) or a checkpoint.")
    return found[-1]


def verify(path: Path) -> None:
    """Compare the files of a checkpoint with its manifest.

    Raises:
        UserError: a file is missing or differs from what was written.
    """
    try:
        expected = read_json(path / "manifest.json", "sha256")["sha256"]
        if set(expected) != FILES:
            raise UserError(f"{path / 'manifest.json'} does not list {', '.join(sorted(FILES))}: it is damaged.")
        for name, digest in expected.items():
            if _digest(path / name) != digest:
                raise UserError(
                    f"{path / name} differs from what was written: the checkpoint is damaged. Take another."
                )
    except (OSError, TypeError) as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}). Take another of its run.") from None


def load(path: Path | str, device: torch.device | str = "cpu") -> Algorithm:
    """The algorithm of a checkpoint, ready to act: its own weights, normalisers and spec; no dataset is needed.

    Raises:
        UserError: no checkpoint, a damaged one, or weights of another shape than its config says.
    """
    path = find(path)
    verify(path)
    data = read_json(path / "export" / "config.json", "algorithm", "config", "spec")
    cls = algorithms.find(data["algorithm"])
    algorithm = cls(Spec.from_json(data["spec"]), config.build(cls.Config, data["config"], str(path)))
    assign(algorithm, _tensors(path / "export" / "model.safetensors"), str(path))
    return algorithm.to(device).eval()


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON that a resume needs."""
    verify(path)
    return _tensors(path / "state" / "training.safetensors"), read_json(path / "state" / "state.json", "step", "source")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged. Take another.") from None


def assign(algorithm: Algorithm, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights by name; every name and shape has to fit.

    Raises:
        UserError: names the first tensor that is missing, unknown or of another shape.
    """
    own = algorithm.state_dict()
    for name in (*own, *tensors):
        if name not in tensors or name not in own:
            side = "is missing from" if name not in tensors else "is unknown to the model but is in"
            raise UserError(f"the tensor {name!r} {side} {where}: the checkpoint is of another model or version.")
        if own[name].shape != tensors[name].shape:
            raise UserError(
                f"the tensor {name!r} has shape {tuple(tensors[name].shape)} in {where}, but this config makes it "
                f"{tuple(own[name].shape)}: resume with the config that the run was started with, or start a new run."
            )
    algorithm.load_state_dict(dict(tensors))
