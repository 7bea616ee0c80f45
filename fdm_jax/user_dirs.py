"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from fdm_jax.errors import UserError
from fdm_jax.whole_files import is_remote, place


def user_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/fdm_jax``, or ``~/.cache/fdm_jax``.

    Raises:
      UserError: there is no home, as in a container whose user is a number only.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdm_jax"
    except RuntimeError as error:
        raise UserError(
            "There is no folder for compiled programs and data: HOME is not set, and this user has no home known here. "
            "Set HOME, or XDG_CACHE_HOME, to a folder that can be written."
        ) from error


def default_data_dir() -> Path:
    """Where prepared data sets are: ``$XDG_CACHE_HOME/fdm_jax/data``, or ``~/.cache/fdm_jax/data``."""
    return user_cache_dir() / "data"


def data_root(data_dir: str | os.PathLike[str] | None) -> Path:
    """Where named data sets are: ``data_dir``, which may be gs://, or else the default.

    Raises:
      UserError: see :func:`fdm_jax.whole_files.place` and :func:`user_cache_dir`.
    """
    return place(data_dir) if data_dir else default_data_dir()


def writable_data_root(data_dir: str | os.PathLike[str] | None) -> Path:
    """The same, for what prepares itself: the default in place of gs://."""
    root = data_root(data_dir)
    return default_data_dir() if is_remote(root) else root
