"""Paths on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from fdm_jax.errors import UserError
from fdm_jax.whole_files import local, place


def path_argument(text: str) -> Path:
    """A local path, for argparse.  An empty one would be the current folder: an unset variable of a shell."""
    return _read(text, local)


def place_argument(text: str) -> Path:
    """A local path or one that begins with gs://, for argparse."""
    return _read(text, place)


def _read(text: str, read: Callable[[str], Path]) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty; if it is a variable of the shell, it is not set.")
    try:
        return read(text)
    except UserError as error:  # which argparse would keep to itself
        raise argparse.ArgumentTypeError(str(error)) from error


def check_out(path: Path, ending: str) -> None:
    """Refuse an --out that is no file of its kind: a slip would overwrite another one, such as a run's config.json.

    Raises:
      UserError: its name ends in something else, or it is a folder.
    """
    if path.suffix != ending:
        raise UserError(f"--out must end in {ending}, and is {path}.")
    if path.is_dir():
        raise UserError(f"--out {path} cannot be written: it is a folder.")


def check_local(args: argparse.Namespace) -> None:
    """Refuse gs:// where only a local path will do.

    Raises:
      UserError: naming the argument.
    """
    for name, value in vars(args).items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path) and path.parts[:1] == ("gs:",):
                raise UserError(
                    f"--{name.replace('_', '-')} must be a local path, and is gs://{'/'.join(path.parts[1:])}."
                )
