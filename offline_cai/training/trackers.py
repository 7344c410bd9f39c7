"""Metrics: always a line of JSON each, and whatever trackers Accelerate knows beside it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_cai.errors import UserError
from offline_cai.files import write_text


class MetricsFile:
    """`metrics.jsonl`: one object per line, flushed as it is written. A resume drops what came after its step.

    Attributes:
        seconds: of training up to the last row that was kept.
        scores: of the evaluations so far, by step.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`."""
        kept = [row for row in read(self._path) if row["step"] <= step] if self._path.exists() else []
        self.seconds = float(kept[-1].get("seconds", 0.0)) if kept else 0.0
        self.scores = {row["step"]: row["score"] for row in kept if "score" in row}
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error}. The checkpoints so far are untouched.") from error
        if "score" in values:
            self.scores[step] = values["score"]

    def best(self) -> int | None:
        """The step with the highest score, the earliest of equals; None if nothing was evaluated."""
        return max(self.scores, key=lambda step: (self.scores[step], -step), default=None)


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what differs between two equal runs: its times."""
    return {k: v for k, v in row.items() if k not in ("seconds", "steps_per_second") and not k.startswith("share_")}


def evaluations(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The evaluations while training, each with the steps in environments that were reported last, if there are any."""
    gathered: dict[str, Any] = {}
    for row in rows:
        gathered = {"environment_steps": row["environment_steps"]} if "environment_steps" in row else gathered
        if "score" in row:
            yield {"step": row["step"], **gathered, "score": row["score"], "return": row["return"]}


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
