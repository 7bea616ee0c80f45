"""Says when work stands still, and what it waits for: storage that is away, data, another process, a device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import jax

from fdm_jax.progress import Progress, say, significant

# Seconds before the first word; the next come after twice, four times, ... as long.
PATIENCE = 600.0


class Watchdog:
    """A thread that speaks when its owner has not called ``at`` for long; it ends nothing, as what is away may come back.

    Each process has one, so that of several it is seen which one the others wait for.

    Args:
      say: takes a line of text, from the thread.
      prefix: of each line.
    """

    def __init__(self, say: Callable[[str], None], prefix: str = ""):
        self._say, self._prefix = say, prefix
        self.at("the run to begin")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(PATIENCE,), daemon=True)

    def at(self, what: str) -> None:
        """From now on, until the next call, the owner waits for this."""
        self._now = (time.monotonic(), what)  # in one piece, for the thread

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self, patience: float) -> None:
        seen, due = self._now, patience
        while not self._ended.wait(patience / 20):
            now = self._now
            if now is not seen:
                seen, due = now, patience
            since, what = now
            if (waited := time.monotonic() - since) >= due:
                self._say(
                    f"{self._prefix}Nothing has moved for {significant(waited / 60, 3)} minutes: waiting for {what}."
                )
                due = 2 * waited


def of_process(progress: Progress) -> Watchdog:
    """This process's own; the first one has the ``progress``, above whose bar it speaks."""
    index = jax.process_index()
    return Watchdog(say if index else progress.say, f"Process {index}: " if jax.process_count() > 1 else "")
