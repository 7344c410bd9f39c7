"""What people see of a training: how far it is, how fast it goes, and where its time goes."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from tqdm import tqdm

LINE_EVERY = 10.0
"""Seconds between plain lines."""


class Clock:
    """Where time goes: `with clock("update"): ...`; nested parts count for themselves only."""

    def __init__(self, step: int) -> None:
        self._began, self._step = time.perf_counter(), step
        self._spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent[part] += time.perf_counter() - began

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one part for another."""
        self._spent[source] -= seconds
        self._spent[target] += seconds

    def report(self, step: int) -> dict[str, float]:
        """Steps per second, and the share of each part in the time, since this was last asked."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        parts = ("data", "environment", "update", "evaluation", "checkpoint")
        shares = {f"share_{part}": round(self._spent[part] / seconds, 4) for part in parts}
        rate = (step - self._step) / seconds
        self._began, self._step = time.perf_counter(), step
        self._spent.clear()
        return {"steps_per_second": round(rate, 3), **shares}


class Progress:
    """A bar on a terminal, plain lines elsewhere (one each ten seconds at most), nothing if quiet."""

    def __init__(self, total: int, start: int, quiet: bool) -> None:
        self._quiet, self._total, self._start = quiet, total, start
        self._began = self._last = time.monotonic()
        self.step = start
        plain = quiet or not sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, desc="train", unit="step", disable=plain, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self._quiet:
            tqdm.write(text, file=sys.stderr)

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        """`step` is done; `values` may hold a loss to show."""
        self._bar.update(step - self.step)
        self.step, now = step, time.monotonic()
        if self._bar.disable and (now - self._last > LINE_EVERY or step == self._total):
            self._last = now
            self.say(self._line(values.get("loss"), now))
        elif "loss" in values:
            self._bar.set_postfix({"loss": f"{values['loss']:.4f}"}, refresh=False)

    def _line(self, loss: float | None, now: float) -> str:
        rate = (self.step - self._start) / max(now - self._began, 1e-9)
        left = timedelta(seconds=round((self._total - self.step) / max(rate, 1e-3)))
        shown = "" if loss is None else f", loss {loss:.4f}"
        return f"train: step {self.step} of {self._total}{shown}, {rate:.1f} steps/s, {left} left"

    def back_to(self, step: int) -> None:
        self.step = step
        self._bar.reset()
        self._bar.update(step)

    def close(self) -> None:
        self._bar.close()
