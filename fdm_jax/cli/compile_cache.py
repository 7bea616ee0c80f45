"""Compiled programs, kept from one start to the next by JAX's cache.

JAX writes an entry in place, and never again: one that a kill or a full disk cut short would be compiled anew, after a
warning, at every start. Here it is removed when JAX comes upon it, so that the program is kept this time.
"""

from __future__ import annotations

import contextlib
import glob
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

from fdm_jax.user_dirs import user_cache_dir

_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL)


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Keep compiled programs in the user's cache directory, unless JAX was told where to keep them."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(user_cache_dir() / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    show = warnings.showwarning

    def show_or_mend(message: Any, *where: Any, **more: Any) -> None:
        trouble = _TROUBLE.fullmatch(str(message))
        if trouble is None:
            return show(message, *where, **more)
        with contextlib.suppress(OSError):  # as of all warnings: nobody may be left to read them
            print(_mended(str(jax.config.jax_compilation_cache_dir), *trouble.groups()), file=sys.stderr, flush=True)  # type: ignore[attr-defined]

    warnings.showwarning = show_or_mend
    try:
        yield
    finally:
        warnings.showwarning = show


def _mended(directory: str, when: str, program: str, cause: str) -> str:
    """Remove what was cut short of a program's entries, and say what that means; ``when`` is "reading" or "writing"."""
    cut_short = _remove_cut_short(directory, program)
    if cut_short and when == "reading":
        return f"{program} in {directory} was cut short, as by a kill or a full disk: removed, to be compiled and kept anew."
    return (
        f"{program} cannot be kept in {directory} ({cause}): the next start compiles it again. "
        "JAX_COMPILATION_CACHE_DIR names another folder for compiled programs."
    )


def _remove_cut_short(directory: str, program: str) -> bool:
    """Whether there were such entries; the program's others, which other configurations have compiled, stay."""
    from etils import epath  # which takes gs:// too, as JAX does

    found = False
    try:
        for entry in epath.Path(directory).glob(f"{glob.escape(program)}-*-cache"):
            if not _is_whole(entry.read_bytes()):
                entry.unlink(missing_ok=True)
                found = True
    except OSError:  # a folder that cannot be read or written; the cause, which JAX gave, is said
        return False
    return found


def _is_whole(entry: bytes) -> bool:
    """Of an entry compressed by zlib; one by Zstandard, which JAX takes if it is installed, is called cut short."""
    stream = zlib.decompressobj()
    try:
        stream.decompress(entry)
    except zlib.error:
        return False
    return stream.eof
