"""Files whose owner has a number and no name, as in a container that runs as whoever started it.

``etils.epath``, with which TFDS and Orbax look at files, asks for the names of owner and group, and raises KeyError where
there are none (https://github.com/google/etils/issues/790).
"""

from __future__ import annotations

import os
import stat

from etils.epath import backend, stat_utils

_stat_with_names = backend.os_backend.stat


def _stat(path: str | os.PathLike[str]) -> stat_utils.StatResult:
    try:
        return _stat_with_names(path)
    except KeyError:
        found = os.stat(path)
    return stat_utils.StatResult(
        is_directory=stat.S_ISDIR(found.st_mode),
        length=found.st_size,
        mtime=int(found.st_mtime),
        owner=str(found.st_uid),
        group=str(found.st_gid),
        mode=found.st_mode,
    )


def allow_nameless_owners() -> None:
    """Let ``epath.Path.stat`` give numbers, as ``ls`` does, where there are no names."""
    backend.os_backend.stat = _stat  # type: ignore[method-assign]
