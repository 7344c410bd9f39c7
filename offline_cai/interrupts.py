"""Ctrl-C as a request that is honoured at a safe point, instead of an exception anywhere."""

import signal
from contextlib import suppress
from types import FrameType


class Interrupt:
    """While it is entered, the first Ctrl-C sets `asked` and the second one stops at once.

    An exception from a signal can surface in a destructor, where Python drops it; a flag cannot get lost.
    """

    def __enter__(self) -> "Interrupt":
        self.asked, self._before = False, None
        with suppress(ValueError):  # outside the main thread, whoever runs it handles signals
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if it was asked for."""
        if self.asked:
            raise KeyboardInterrupt

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
