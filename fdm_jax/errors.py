"""The exceptions that a person, or a launcher, is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: one sentence saying what, which value, and what would be right.

    The command line prints the sentence and exits with code 2; library callers may catch it.
    """


# BSD's EX_TEMPFAIL: try again later.
RESTART_CODE = 75


class RestartNeeded(RuntimeError):
    """The work ended early through no fault of its own, and all that is needed to go on is saved.

    The command line prints the sentence and exits with :data:`RESTART_CODE`: the same command goes on.
    """


def memory_full(error: BaseException | None) -> str | None:
    """What was said of it, if an error or one behind it is that memory is full: a device's, or the machine's."""
    while error is not None:
        text = str(error)
        # JAX's own type is not named here, so that short commands need not import JAX.
        if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED:" in text:
            return text.split("RESOURCE_EXHAUSTED:")[-1].strip().partition("\n")[0].rstrip(".")
        if isinstance(error, MemoryError):
            return text.rstrip(".") or "the machine gives no more"
        error = error.__cause__ or error.__context__
    return None


def nearest(word: str, choices: Iterable[str]) -> str:
    """Words for the end of an error sentence: the choice most like ``word``, or the whole list if none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of " + ", ".join(choices) + "."
