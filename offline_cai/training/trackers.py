"""Metrics: always a line of JSON each, and whatever trackers Accelerate knows beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """`metrics.jsonl`: one object per line, flushed as it is written. A resume drops what came after its step."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = [row for row in read(path) if row["step"] <= resume_step] if path.exists() else []
        self._file = path.open("w")
        for row in kept:
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
