"""The one error that means "you can mend this": its text says what, where and how. And the one warning about data."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a user's input. The command line prints it as one sentence and exits with status 2."""


class Notice(UserWarning):
    """Something is odd, or was wrong and has been dealt with; the command line prints it as one sentence."""


class Interrupted(Exception):
    """Work was stopped by a signal; what was finished is kept. The text says how to go on.

    Attributes:
        status: what the command line exits with: 130 after Ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, text: str, status: int = 130) -> None:
        super().__init__(text)
        self.status = status


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A closing half-sentence for an unknown name: the nearest options, or all of them when none is near."""
    options = sorted(options)
    near = difflib.get_close_matches(word, options, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(name) for name in near)}?"
    return f"there are: {', '.join(options)}." if options else "there are none."
