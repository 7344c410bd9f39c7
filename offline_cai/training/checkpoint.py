"""Checkpoints: an export to act with and a state to resume from, as safetensors and JSON. Nothing is executed on load.

    checkpoints/step-00004000/manifest.json                                sha256 of every file below
                              export/                                      averaged weights and normalisers (export.py)
                              state/state.json  training.safetensors       raw weights, optimisers, average

A checkpoint is written under a temporary name, flushed to the disk and then renamed: it is there whole or not at all.
Whoever asks for the last one gets the last that is whole: a damaged one is named in a warning and passed over.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from offline_cai import __version__, algorithms, config
from offline_cai import export as exports
from offline_cai.core import Algorithm, Spec
from offline_cai.errors import Notice, UserError
from offline_cai.export import digest, savable, tensors_in
from offline_cai.files import read_json

FORMAT = 2
FILES = {
    *(f"export/{name}" for name in (*exports.FILES, "manifest.json")),
    "state/state.json",
    "state/training.safetensors",
}


class Export(NamedTuple):
    """What it takes to act: the algorithm's name, what it is built from, and its weights."""

    algorithm: str
    config: Any
    spec: Spec
    weights: Mapping[str, Tensor]

    def to_json(self) -> dict[str, Any]:
        return {"algorithm": self.algorithm, "config": config.to_dict(self.config), "spec": self.spec.to_json()}


def save(folder: Path, step: int, export: Export, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` into `folder`.

    One that is there already is left as it is, unless it is damaged or its source has gathered more since.

    Args:
        export: what it takes to act.
        tensors: what a resume needs besides: raw weights, optimiser moments.
        state: JSON that goes with them.

    Raises:
        UserError: the disk refuses; earlier checkpoints are untouched.
    """
    target, temporary = folder / f"step-{step:08d}", folder / f".writing-step-{step:08d}"
    if target.exists() and not damage(target) and source_facts(target) == json.loads(json.dumps(state["source"])):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
            shutil.rmtree(left)
        exports.write(temporary / "export", export.to_json(), export.weights)
        (temporary / "state").mkdir()
        save_file(savable(tensors), temporary / "state" / "training.safetensors")
        (temporary / "state" / "state.json").write_text(json.dumps({"step": step, **state}))
        manifest = {name: digest(temporary / name) for name in sorted(FILES)}
        data = {"format": FORMAT, "version": __version__, "step": step, "sha256": manifest}
        (temporary / "manifest.json").write_text(json.dumps({**data, "own sha256": _own_digest(data)}, indent=1))
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        gone = folder / f".removing-{target.name}"
        if target.exists():
            target.rename(gone)
        os.replace(temporary, target)
        _flush(folder)
        shutil.rmtree(gone, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write the checkpoint {target}: {error}. Earlier checkpoints are untouched.") from error
    return target


def prune(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` up to `step` and that of step `best`; what a fallback left behind it goes too."""
    found = checkpoints(folder)
    past = [path for path in found if _step(path) <= step]
    for old in (*past[:-keep], *found[len(past) :]):
        if best is None or _step(old) != best:
            gone = old.rename(folder / f".removing-{old.name}")  # half removed, it should not look like a damaged one
            shutil.rmtree(gone, ignore_errors=True)


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Reading -------------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, damaged ones included."""
    return sorted((path for path in folder.glob("step-*") if _step(path) >= 0 and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    """The step that a checkpoint's name says; -1 for other names."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else -1


def find(path: Path | str) -> Path:
    """The checkpoint that a user means: one by its folder, or the last of a run that is whole.

    Raises:
        UserError: there is none, or all are damaged.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        verify(path)
        return path
    found = checkpoints(path / "checkpoints") or checkpoints(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint: name a run's folder (the one with config.yaml) or a checkpoint.")
    for number, checkpoint in enumerate(reversed(found), start=1):
        fault = damage(checkpoint)
        if not fault:
            return checkpoint
        if number < len(found):
            warnings.warn(f"{fault} The one before it is taken instead.", Notice, stacklevel=2)
    raise UserError(f"no checkpoint of {path} can be used: {fault}")


def damage(path: Path) -> str:
    """What is wrong with a checkpoint of a run, in a sentence; empty if nothing is."""
    try:
        step = verify(path)
    except UserError as error:
        return str(error)
    return "" if path.name == f"step-{step:08d}" else f"the checkpoint {path} is damaged (it is that of step {step})."


def verify(path: Path) -> int:
    """Compare the files of a checkpoint with its manifest; gives its step.

    Raises:
        UserError: it is of another version, or a file is missing or differs from what was written.
    """
    try:
        manifest = read_json(path / "manifest.json", "format", "step", "sha256")
        own = manifest.pop("own sha256", None)
        if manifest["format"] != FORMAT:
            raise UserError(
                f"the checkpoint {path} has format {manifest['format']!r}, and this version reads {FORMAT}: use it "
                f"with offline_cai {manifest.get('version', '0.1.0')}, which wrote it, or train again."
            )
        if set(manifest["sha256"]) != FILES:
            raise UserError(f"{path / 'manifest.json'} does not list {', '.join(sorted(FILES))}: it is damaged.")
        if own != _own_digest(manifest):
            raise UserError(f"{path / 'manifest.json'} differs from what was written: the checkpoint is damaged.")
        for name, wanted in dict(manifest["sha256"]).items():
            if digest(path / name) != wanted:
                raise UserError(f"{path / name} differs from what was written: the checkpoint is damaged.")
        return int(manifest["step"])
    except UserError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}).") from None


def load(path: Path | str, device: torch.device | str = "cpu") -> Algorithm:
    """The algorithm of a checkpoint, ready to act: its own weights, normalisers and spec; no dataset is needed.

    Raises:
        UserError: no checkpoint, a damaged one, or weights of another shape than its config says.
    """
    path = find(path)
    data = read_json(path / "export" / "config.json", "algorithm")
    return algorithms.find(data["algorithm"]).from_pretrained(path / "export").to(device)


def source_facts(path: Path) -> dict[str, Any]:
    """What the source of batches told when this checkpoint was made."""
    return read_json(path / "state" / "state.json", "source")["source"]


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON that a resume needs, from a checkpoint that `find` gave."""
    facts = read_json(path / "state" / "state.json", "step", "experiment", "training", "source")
    return tensors_in(path / "state" / "training.safetensors"), facts
