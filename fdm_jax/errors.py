"""The exceptions that a person, or a launcher, is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


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


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those behind it, which led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# Types of errors from JAX's runtime.  They are not named by JAX's own names, so that short commands need not import JAX.
_RUNTIME = ("JaxRuntimeError", "XlaRuntimeError")


# How JAX says of a platform that it is not installed.
_NOT_INSTALLED = ("is not in the list of known backends", "cannot open shared object file")


def not_installed(error: BaseException) -> bool:
    """Whether an error says that JAX has no such platform."""
    return any(words in str(error) for words in _NOT_INSTALLED)


def lost_another(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is of communication with another process, and not of this one's own making."""
    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION: Buffer")
    for each in with_causes(error):
        text = str(each)
        if not_installed(each):
            return False
        if type(each).__name__ in _RUNTIME:
            return not text.startswith(own)
        if isinstance(each, ValueError) and "Gloo" in text:  # what jax 0.7 makes of it where a program is launched
            return True
    return False


def memory_full(error: BaseException | None) -> str | None:
    """What was said of it, if an error or one behind it is that memory is full: a device's, or the machine's."""
    for each in with_causes(error):
        text = str(each)
        if type(each).__name__ in _RUNTIME and "RESOURCE_EXHAUSTED:" in text:
            return text.split("RESOURCE_EXHAUSTED:")[-1].strip().partition("\n")[0].rstrip(".")
        if isinstance(each, MemoryError):
            return text.rstrip(".") or "the machine gives no more"
        if (said := "Cannot allocate memory") in text:  # the system's words, where it starts no other process, say
            return said
    return None


def nearest(word: str, choices: Iterable[str]) -> str:
    """Words for the end of an error sentence: the choice most like ``word``, or the whole list if none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "choose one of " + ", ".join(choices) + "."
