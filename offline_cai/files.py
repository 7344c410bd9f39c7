"""Small files that are read strictly and written whole."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from offline_cai.errors import UserError


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The object in a JSON file, which has to have these keys.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): it is damaged. Remove or restore it.") from None
    if not isinstance(data, dict) or not set(keys) <= data.keys():
        wanted = f" with {', '.join(keys)}" if keys else ""
        raise UserError(f"{path} should hold a JSON object{wanted}: it is damaged. Remove or restore it.")
    return data


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UserError: the disk refuses; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}.") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, in a folder that is made if need be; when this returns, it is on the disk.

    Raises:
        UserError: the disk refuses; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}.") from error
