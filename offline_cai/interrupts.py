"""Ctrl-C and SIGTERM as requests that are honoured at a safe point, instead of exceptions anywhere."""

import signal
from contextlib import suppress
from types import FrameType
from typing import Any


class Asked(Exception):
    """Long work ended early, at a safe point, because it was asked to."""


class Interrupt:
    """While it is entered, the first SIGINT or SIGTERM sets `asked` to its number, and the second one stops at once.

    An exception from a signal can surface in a destructor, where Python drops it; a flag cannot get lost.
    """

    def __enter__(self) -> "Interrupt":
        self.asked, self._before = 0, dict[int, Any]()
        with suppress(ValueError):  # outside the main thread, whoever runs it handles signals
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = number

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
