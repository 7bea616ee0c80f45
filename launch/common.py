"""What the launchers share: arguments after ``--``, sentences instead of tracebacks, and when to start a run again."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, TextIO

REPOSITORY = Path(__file__).resolve().parent.parent

DONE, USER_ERROR, RESTART = 0, 2, 75  # exit codes of `fdm`; RESTART is fdm_jax.errors.RESTART_CODE
INTERRUPTED = 130

EXIT_CODES = """
Exit codes of fdm, and of this program: 0 done (or saved after Ctrl-C); 2 something that you can mend, so it is never
started again; 75 saved because of a preemption or a lost process, start again; 130 ended by Ctrl-C without saving;
all others: a crash.
"""


class Refusal(Exception):
    """One sentence for the user; the program ends with code 2."""


def say(text: str) -> None:
    """A line of the launcher's own."""
    show(f"launch: {text}\n", sys.stderr)


def show(text: str, stream: TextIO | None = None) -> None:
    """On standard output, at once; lost where a log's disk is full or nobody reads it, which a run is to outlive."""
    stream = stream or sys.stdout
    if stream is None:  # closed, as by >&-
        return
    with contextlib.suppress(OSError):  # and not kept in a buffer, which Python would try to write out at its end
        os.write(stream.fileno(), text.encode(stream.encoding, "replace"))


def parser(description: str | None) -> argparse.ArgumentParser:
    """With what all launchers take."""
    made = argparse.ArgumentParser(
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--dry-run", action="store_true", help="print the commands, one per line, and run nothing")
    return made


def parse(made: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own arguments, and those of fdm: what comes after the first ``--``."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    return made.parse_args(argv[:cut]), argv[cut + 1 :]


def seconds(text: str) -> float:
    """For argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 seconds or more, and is {text!r}.")
    return value


def shell_words(text: str) -> list[str]:
    """A program and its first arguments, for argparse."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"cannot be read as a shell reads it ({error}), and is {text!r}.") from error
    if not found:
        raise argparse.ArgumentTypeError("names no program.")
    return found


def need_command(command: Sequence[str], adds_distributed: bool = True) -> None:
    """Raises:
    Refusal: there is no fdm command after ``--``, or it says --distributed itself where the launcher does.
    """
    if not command or command[0].startswith("-"):
        raise Refusal(
            "The fdm command comes after --, as in: -- train --config=configs/edm.py:cifar10 --workdir=runs/cifar10"
        )
    if adds_distributed and option(command, "distributed") is not None:
        raise Refusal("Leave --distributed out of the fdm command: the launcher adds the one that fits.")


def need_positive(args: argparse.Namespace, *names: str) -> None:
    """Raises:
    Refusal: one of these arguments is given and is not 1 or more.
    """
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise Refusal(f"--{name.replace('_', '-')} must be 1 or more, and is {value}.")


def option(command: Sequence[str], name: str) -> str | None:
    """The value of ``--name=VALUE`` or ``--name VALUE`` in an fdm command; None without it."""
    for i, token in enumerate(command):
        if token.startswith(f"--{name}="):
            return token.partition("=")[2]
        if token == f"--{name}":
            return command[i + 1] if i + 1 < len(command) else ""
    return None


def default_fdm() -> str:
    """The ``fdm`` that `make install` put into this repository, or else the one on the path."""
    installed = REPOSITORY / ".venv" / "bin" / "fdm"
    return shlex.quote(str(installed)) if installed.exists() else "fdm"


def run(command: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program that must be there; what it asks on a terminal is not answered.

    Raises:
      Refusal: it is not.
    """
    try:
        return subprocess.run(command, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    except OSError as error:
        raise missing(command[0], error) from error


def become(command: Sequence[str]) -> NoReturn:
    """Run a program in this one's place, for one that ends by itself when told to: all signals reach it.

    Raises:
      Refusal: it is not there.
    """
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        raise missing(command[0], error) from error


def missing(program: str, error: OSError) -> Refusal:
    """What is said of a program that the system does not start."""
    if not isinstance(error, FileNotFoundError):
        return Refusal(f"{program!r} cannot be started ({error.strerror}): see to it, or give --dry-run.")
    return Refusal(f"There is no {program!r} on the path: install it, or give --dry-run.")


# Names of what an fdm command keeps: 4000, 000063.png, 000004096.npz; not those of what is still being written.
KEPT = r"([0-9]+)(\.png|\.npz)?"


class Kept(NamedTuple):
    """What an fdm command keeps on its way, and does not make again after a stop.

    Attributes:
      noun: what it is called.
      folder: local or gs://, without a slash at its end.
      below: folders between that one and what is kept, with a slash at their end; may have a ``*``.
    """

    noun: str
    folder: str
    below: str = ""

    def listing(self) -> str:
        """A shell's command that lists it."""
        if self.folder.startswith("gs://"):
            return shlex.join(["gcloud", "storage", "ls", self._objects()])
        return f"ls {shlex.quote(f'{self.folder}/')}{self.below}"

    def _objects(self) -> str:
        return f"{self.folder}/{self.below}*" if self.below else f"{self.folder}/"

    def progress(self) -> tuple[int, int] | None:
        """How many there are, and the last one's number; None if there is none or nobody can say."""
        if self.folder.startswith("gs://"):
            try:
                listed = run(["gcloud", "storage", "ls", self._objects()], capture_output=True, timeout=300)
            except (Refusal, subprocess.TimeoutExpired):
                return None
            names = [line.rstrip("/").rpartition("/")[2] for line in listed.stdout.splitlines()]
        else:
            try:
                names = [path.name for path in Path(self.folder).glob(f"{self.below}*")]
            except OSError:  # its file server is away, which may be why the run ended
                return None
        numbers = [int(found[1]) for name in names if (found := re.fullmatch(KEPT, name))]
        return (len(numbers), max(numbers)) if numbers else None


def kept(command: Sequence[str]) -> Kept:
    """What an fdm command keeps."""
    workdir, out = ((option(command, name) or "").rstrip("/") for name in ("workdir", "out"))
    if command[0] == "generate":
        return Kept("picture", f"{out}.parts" if Path(out).suffix in (".png", ".npz") else out)
    if command[0] == "evaluate":
        # Without a workdir they are in the folder where it was started.
        return Kept("piece", out, "features/") if out else Kept("piece", f"{workdir or '.'}/evaluations", "*/features/")
    return Kept("checkpoint", f"{workdir}/checkpoints")


@dataclasses.dataclass
class Restarts:
    """Decides whether a run that ended is started again.

    After code 75, as long as something new is kept (a checkpoint, a picture) since the last start, or else ``limit`` times
    in a row.  After a crash ``limit`` times, counted anew when something new is kept, waiting twice as long each time.
    After codes 2 and 130 never.

    Attributes:
      limit: see above.
      backoff: seconds to wait after the first crash.
      kept: what the run keeps.
    """

    limit: int
    backoff: float
    kept: Kept

    def __post_init__(self) -> None:
        self._crashes = self._idle = 0
        self._seen = self.kept.progress()

    def after(self, code: int) -> tuple[float | None, str]:
        """(seconds to wait before the next start, or None to give up; the reason in words)."""
        if code == USER_ERROR:
            return None, "code 2 is something to mend first"
        if code == INTERRUPTED:
            return None, "code 130 is Ctrl-C's"
        found, new = self.kept.progress(), f"new {self.kept.noun}"
        if moved := found is not None and found != self._seen:
            self._crashes = self._idle = 0
            self._seen = found
        if code == RESTART:
            self._idle += not moved
            if self._idle > self.limit:
                return None, f"{self._idle} starts in a row brought no {new}"
            return 0.0, "code 75 asks for it"
        self._crashes += 1
        if self._crashes > self.limit:
            return (
                None,
                f"crash {self._crashes} without a {new} in between, and --max-restarts is {self.limit}",
            )
        return min(300.0, self.backoff * 2 ** (self._crashes - 1)), f"restart {self._crashes} of at most {self.limit}"


def verdict(codes: Sequence[int | None]) -> int:
    """One exit code for those who have ended: a user's error before a crash before 75 before 0."""
    ended = [code for code in codes if code]
    if not ended:
        return DONE
    if USER_ERROR in ended:
        return USER_ERROR
    first = next((code for code in ended if code != RESTART), RESTART)
    return 128 - first if first < 0 else first


def finish(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a launcher and leave with its exit code."""
    try:
        code = main(sys.argv[1:])
        if sys.stdout is not None:  # it was not closed
            sys.stdout.flush()
    except Refusal as refusal:
        say(str(refusal))
        code = USER_ERROR
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # what read the commands of a dry run has ended, as `head` does
        os._exit(128 + signal.SIGPIPE)
    sys.exit(code)
