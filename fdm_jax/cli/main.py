"""``fdm COMMAND ...``: finds the command, and turns user errors into one sentence and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import io
import keyword
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

from absl import logging

from fdm_jax import __version__
from fdm_jax.cli.compile_cache import compile_cache
from fdm_jax.cli.distributed import leave_together
from fdm_jax.cli.places import check_local
from fdm_jax.errors import RESTART_CODE, RestartNeeded, UserError, memory_full, not_installed, with_causes
from fdm_jax.host_memory import keep_freed_memory
from fdm_jax.progress import say
from fdm_jax.storage_errors import disk_full, file_trouble, may_pass, refusal
from fdm_jax.xla_flags import avoid_slow_convolutions

COMMANDS = (
    "train",
    "generate",
    "edit",
    "likelihood",
    "sweep",
    "evaluate",
    "report",
    "dataset",
    "import",
    "export",
    "plan",
    "bench",
    "profile",
    "demo",
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one command.  The commands' modules leave imports that take long to the functions that need them."""
    parser = _Parser(
        prog="fdm",
        description="Fast Diffusion Model in JAX: diffusion models with momentum, trained and sampled.",
        epilog="`fdm COMMAND --help` says more of each command.",
    )
    parser.add_argument("--version", action="version", version=f"fdm_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"fdm_jax.cli.{name}_" if keyword.iskeyword(name) else f"fdm_jax.cli.{name}")
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    args, unknown = parser.parse_known_args(argv)
    args.overrides = []
    takes_config = hasattr(args, "config")
    while unknown:
        token = unknown.pop(0)
        if not (takes_config and token.startswith("--config.")):
            parser.error(f"{args.command} does not know the argument {token!r}; see fdm {args.command} --help.")
        args.overrides.append(token)
        if "=" not in token and unknown and not unknown[0].startswith("--"):
            args.overrides.append(unknown.pop(0))
    return args


class _Parser(argparse.ArgumentParser):
    """Takes whole names of options only, as the launchers do when they read a command; so do the parsers below it."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)


def main(argv: Sequence[str]) -> int:
    """Run a command.

    Returns:
      its exit code: 0, 2 for what the user can mend, 75 for "start me again", 130 after Ctrl-C, or 1 where a disk, the
      network to it, or a device fails.
    """
    args = parse(argv)
    try:
        check_local(args)
        logging.set_verbosity(logging.FATAL)  # libraries report at length what is said in a sentence here
        keep_freed_memory()
        avoid_slow_convolutions()
        os.environ.update(_ENVIRONMENT)
        with compile_cache():
            return args.run(args)
    except UserError as error:
        sentence, code = str(error), 1 if may_pass(error) else 2
    except RestartNeeded as error:
        sentence, code = str(error), RESTART_CODE
    except KeyboardInterrupt:
        sentence, code = "stopped; the same command begins again or goes on.", 130
    except Exception as error:
        if (explained := _explained(error, args)) is None:
            raise
        sentence, code = explained
    say(f"fdm {args.command}: {sentence}")
    if code == 2:
        leave_together(sentence)
    elif code in (1, 130):
        leave_together(None, seconds=10)  # or alone, from those that wait for this one and then find it gone
    return code


# JAX's defaults, whatever the environment asks for: so that a run draws alike, one of two ways to draw from a key, and seeds
# as they are; and NumPy's rules for shapes and types, which this program and libraries of its rely on.
_ENVIRONMENT = {
    "JAX_THREEFRY_PARTITIONABLE": "1",
    "JAX_RANDOM_SEED_OFFSET": "0",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
}

_GO_ON = "nothing already saved is lost, and the same command goes on."


def _explained(error: Exception, args: argparse.Namespace) -> tuple[str, int] | None:
    """(sentence, exit code) for an error that other libraries make of what is no fault of the program's."""
    if disk_full(error):
        return f"The disk, or your quota of it, is full: make room; {_GO_ON}", 2
    if trouble := file_trouble(error):
        # Launchers take 1 for a crash, and try again a few times.
        return f"{trouble.sentence}; {_GO_ON}", 1 if trouble.may_pass else 2
    if refused := refusal(error):
        return refused, 2
    if failed := devices_failed(error):
        return failed
    if isinstance(error, FileNotFoundError) and _folder_gone():
        return "The current folder is there no more: change to another one, or back to what is at its place now.", 2
    if said := memory_full(error):
        return f"Memory is full ({said}): {_less_memory(args)}. Nothing already saved is lost.", 2
    return None


def _folder_gone() -> bool:
    """Whether the current folder was deleted; ``.`` is there still."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def devices_failed(error: BaseException | None) -> tuple[str, int] | None:
    """(sentence, exit code) if an error, or one behind it, is that JAX cannot start, or not on its devices."""
    for each in with_causes(error):
        said = " ".join(str(each).split())
        if isinstance(each, RuntimeError) and said.startswith("Unable to initialize backend"):
            # Where it is installed, it may be in use by a process that is about to end.
            return f"JAX does not start: {said}", 2 if not_installed(each) else 1
        # Wordless, where no platform of JAX_PLATFORMS has a device.
        if isinstance(each, AssertionError) and _module_of(each) == "jax._src.xla_bridge":
            asked = os.environ.get("JAX_PLATFORMS")
            return f"JAX_PLATFORMS is {asked!r}, and there is no such device here: unset it, or take another.", 2
        if isinstance(each, ValueError) and _module_of(each) == "jax._src.config":
            return f"JAX does not start with a value that the environment gives: {said.removesuffix('.')}.", 2
    return None


def _module_of(error: BaseException) -> str:
    """Which module raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""


def _less_memory(args: argparse.Namespace) -> str:
    """What a command would take less of it with."""
    if hasattr(args, "batch"):
        return f"give a smaller --batch than {args.batch or 64}"
    if not hasattr(args, "config"):
        return "free some, or use a machine with more"
    batch = "--batch-size" if hasattr(args, "batch_size") else "--config.train.batch_size"
    return (
        f"give a smaller {batch}, or with the same one a larger --config.train.accumulation or some --config.remat, "
        "or use more devices; `fdm plan` says what a step takes"
    )


def entry_point() -> None:
    """Run the command that Python was given, and end with its exit code."""
    # A name that cannot be shown on standard output is shown escaped, as on standard error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _leave_out_echoes
    # Pictures are drawn into files, and matplotlib refuses to be imported for a back end that it does not know.
    os.environ["MPLBACKEND"] = "agg"
    code = 0
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except Exception as error:
        code = code or _code_of(error)
    try:
        sys.stderr.flush()
    except OSError:  # of lines that were given up; Python would try once more, and end with a code of its own
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    if code:
        # The sentence is said: exit handlers of libraries would only repeat its cause in a page of their own, and wait for
        # other processes that wait for this one.
        os._exit(code)


def _code_of(error: Exception) -> int:
    """The exit code for an error that :func:`main` does not explain, or of what it printed; after saying what there is to say."""
    if isinstance(error, BrokenPipeError) and (_unread(sys.stdout) or _unread(sys.stderr)):
        return 128 + signal.SIGPIPE  # what read the output has ended, as `head` does: nobody is left to be told
    if disk_full(error):  # that to which it writes what it says
        say("fdm: The disk to which the output goes is full.")
        return 2
    if trouble := file_trouble(error):
        say(f"fdm: {trouble.sentence}.")
        return 1 if trouble.may_pass else 2
    sys.excepthook(type(error), error, error.__traceback__)  # as Python does
    return 1


def _leave_out_echoes(unraisable: Any) -> None:
    """Report an error that nobody can catch, as Python does, but for echoes of one that is reported.

    Where one write of many fails, such as on a full disk, or one read, of a damaged checkpoint, the others find that nobody
    waits for them any more: a traceback each, hundreds in all.
    """
    if not str(unraisable.exc_value).startswith(
        ("Event loop is closed", "Encountered error while reading array index")
    ):
        sys.__unraisablehook__(unraisable)


def _unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))
