"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/fdm_jax``, or ``~/.cache/fdm_jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fdm_jax"


def default_data_dir() -> Path:
    """Where prepared data sets are: ``$XDG_CACHE_HOME/fdm_jax/data``, or ``~/.cache/fdm_jax/data``."""
    return user_cache_dir() / "data"
