"""How long work goes, for the eye: a bar on a terminal, lines in a log, and numbers as people read them."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

# Between lines in a log, of work that counts faster than anybody reads.
LINE_SECONDS = 30.0


class Progress:
    """A bar on a terminal; plain lines, one per call of ``count`` or ``report``, elsewhere.

    Args:
      total: images of the whole work.
      done: images that were done before this start.
      quiet: show nothing (processes other than the first).
      seconds: from one line of ``count`` to the next, at least.
      last: say that all are done, however soon; not where a line with the result says so.
    """

    def __init__(self, total: int, done: int, quiet: bool = False, seconds: float = 0.0, last: bool = True):
        self._total, self._done, self._quiet, self._seconds = total, done, quiet, seconds
        self._before, self._began = done, time.monotonic()
        self._said, self._bar = self._began, None
        self._last = last
        if sys.stderr.isatty() and not quiet:
            # One that is begun while there is another is below it, and goes when it is closed (leave=None).
            self._bar = tqdm(
                total=total, initial=done, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05, leave=None
            )

    def advance(self, done: int) -> None:
        """``done`` images are done."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done

    def count(self, done: int, note: str = "") -> None:
        """``done`` images are done; say so, if it is time, with the speed since this start."""
        self.advance(done)
        now = time.monotonic()
        all_done = self._last and done == self._total
        if self._bar is not None or now >= self._said + self._seconds or all_done:
            self.report((done - self._before) / max(now - self._began, 1e-9), note)
            self._said = now

    def more(self, images: int, note: str = "") -> None:
        """So many more are done; say so likewise."""
        self.count(self._done + images, note)

    def report(self, img_per_s: float, note: str = "") -> None:
        """Say how it goes."""
        if self._bar is not None:
            self._bar.set_postfix_str(note.strip(), refresh=False)
        elif not self._quiet:
            speed = ""
            if img_per_s > 0:
                left = (self._total - self._done) / img_per_s
                speed = f"{significant(img_per_s, 3)} img/s  {duration(left)} left"
            self.say(
                f"{self._done:>11,} of {self._total:,} images ({self._done / self._total:4.0%})  {note}"
                f"{'  ' if note else ''}{speed}".rstrip()
            )

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            with _whether_read_or_not():
                self._bar.write(text, file=sys.stderr)
        elif not self._quiet:
            say(text)

    def close(self) -> None:
        """The bar goes no further."""
        if self._bar is not None:
            self._bar.close()


def say(text: str) -> None:
    """A line on standard error; lost where there is no room for it, or nobody to read it."""
    with _whether_read_or_not():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _whether_read_or_not() -> Iterator[None]:
    """The work, and the exit code by which it ends, are worth more than the lines on it.

    The disk of a log may be full, or its file server away; later lines of it are then tried again.
    """
    try:
        yield
    except OSError:
        if not stat.S_ISREG(os.fstat(sys.stderr.fileno()).st_mode):
            # A pipe whose reader has ended, or a terminal that was closed.  Libraries write to it as well.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def significant(value: float, digits: int = 4) -> str:
    """A number of so many digits, or of all those before the point: 0.1235, 12,346."""
    whole = 10**digits - 0.5 <= abs(value) < 1e15  # what is rounded up to one digit more is whole as well
    return f"{value:,.0f}" if whole else f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
