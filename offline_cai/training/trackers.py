"""Metrics: always a line of JSON each, and whatever trackers Accelerate knows beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_cai.errors import UserError
from offline_cai.files import write_text


class MetricsFile:
    """`metrics.jsonl`: one object per line, flushed as it is written. A resume drops what came after its step.

    Attributes:
        seconds: of training up to the last row that was kept.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [row for row in read(path) if row["step"] <= resume_step] if path.exists() else []
        self.seconds = float(kept[-1].get("seconds", 0.0)) if kept else 0.0
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off is left out.

    Raises:
        UserError: the file cannot be read, or another line is not an object with a step.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}. Remove or restore it.") from None
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = json.loads(line)
            row["step"] + 0
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            if number == text.count("\n") + 1:  # no line break after it: it was being written
                break
            raise UserError(f"{path}, line {number}, is no metrics: remove the line, or the file.") from None
    return rows
