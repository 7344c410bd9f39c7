"""Exports: what it takes to act, as safetensors and JSON in one folder. Nothing is executed on load.

    config.json         the algorithm's name, its config and its spec
    model.safetensors   weights and everything that was fitted or estimated
    manifest.json       sha256 of the two

A checkpoint (training/checkpoint.py) holds one, and `Algorithm.save_pretrained` writes one by itself.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from offline_cai.errors import UserError
from offline_cai.files import read_json

FORMAT = 1
FILES = ("config.json", "model.safetensors")


def write(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an export into a new folder; `data` is the JSON of config.json."""
    folder.mkdir(parents=True)
    save_file(savable(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(data, indent=1))
    manifest = {name: digest(folder / name) for name in FILES}
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "sha256": manifest}, indent=1))


def write_whole(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """`write` under a temporary name, which is then renamed.

    Raises:
        UserError: there is something at `folder`, or the disk refuses.
    """
    if folder.exists():
        raise UserError(f"{folder} exists already and is not overwritten: name another folder.")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        write(temporary / "export", data, tensors)
        os.replace(temporary / "export", folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the export {folder}: {error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def find(path: Path | str) -> Path:
    """The export that a path means: itself, or that of a checkpoint or of a run's last checkpoint.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    last = sorted(path.glob("checkpoints/step-*/export"))[-1:]
    for folder in (path, path / "export", *last):
        if (folder / "manifest.json").is_file() and (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path} holds no export: name a run's folder, a checkpoint, or what save_pretrained wrote.")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors of an export.

    Raises:
        UserError: a file is missing or differs from what was written.
    """
    manifest = read_json(folder / "manifest.json", "format", "sha256")
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder} has format {manifest['format']}, and this version reads {FORMAT}: export it again.")
    try:
        for name in FILES:
            if digest(folder / name) != manifest["sha256"][name]:
                raise UserError(f"{folder / name} differs from what was written: the export is damaged. Take another.")
    except (OSError, KeyError, TypeError) as error:
        raise UserError(f"the export {folder} is damaged ({error}). Take another.") from None
    data = read_json(folder / "config.json", "algorithm", "config", "spec")
    return data, tensors_in(folder / "model.safetensors")


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged. Take another.") from None


def savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU: safetensors wants no shared memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def assign(module: torch.nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy weights by name; every name and shape has to fit.

    Raises:
        UserError: names the first tensor that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    for name in (*own, *tensors):
        if name not in tensors or name not in own:
            side = "is missing from" if name not in tensors else "is unknown to the model but is in"
            raise UserError(f"the tensor {name!r} {side} {where}: the checkpoint is of another model or version.")
        if own[name].shape != tensors[name].shape:
            raise UserError(
                f"the tensor {name!r} has shape {tuple(tensors[name].shape)} in {where}, but this config makes it "
                f"{tuple(own[name].shape)}: resume with the config that the run was started with, or start a new run."
            )
    module.load_state_dict(dict(tensors))


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
