"""Files that are written whole or not at all: a reader sees the old one or the new."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.errors import UserError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file beside the final one, then rename it; the folder is made.

    Raises:
      UserError: it cannot be written; a full disk is left to the command line, which has a sentence for it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # there only if something went wrong
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an ``.npz``.

    Raises:
      UserError: it cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, NumPy would change it
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, write)
