"""Compiled programs, kept from one start to the next by JAX's cache.

JAX writes an entry in place, and never again: one that a kill or a full disk cut short would be compiled anew, after a
warning, at every start. Here it is removed when JAX comes upon it, so that the program is kept this time.
"""

from __future__ import annotations

import contextlib
import glob
import re
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdm_jax.progress import say
from fdm_jax.user_dirs import user_cache_dir
from fdm_jax.whole_files import check_utf8, is_remote, place

_TROUBLE = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (.*)", re.DOTALL)


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Keep compiled programs in the user's cache directory, unless JAX was told where to keep them."""
    import jax

    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if folder is None:
        folder = str(user_cache_dir() / "jax")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    _keep_in(folder)
    show = warnings.showwarning

    def show_or_mend(message: Any, *where: Any, **more: Any) -> None:
        trouble = _TROUBLE.fullmatch(str(message))
        if trouble is None:
            return show(message, *where, **more)
        say(_mended(str(jax.config.jax_compilation_cache_dir), *trouble.groups()))  # type: ignore[attr-defined]

    warnings.showwarning = show_or_mend
    try:
        yield
    finally:
        warnings.showwarning = show


def _keep_in(folder: str) -> None:
    import jax

    check_utf8(Path(folder))
    jax.config.update("jax_compilation_cache_dir", folder)
    if is_remote(folder):
        place(folder)  # says what is missing
        # XLA's own files of timings, which JAX would have it keep there too, can be local ones only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def share_compile_cache(workdir: Path | None) -> None:
    """Of several processes: keep compiled programs where all of them see them, or not at all.

    JAX has the first process alone write its cache.  One that does not see these files would compile at every start; and
    on GPUs, where XLA has all that compile a program share out the timing of its kernels (xla_gpu_shard_autotuning), it
    would wait for the share of a first process that has the program already.  So they are kept in the usual place if this
    is on a file system that all share, as a cluster's homes, or else in ``.jax_cache`` in the workdir.  (On CPUs JAX's keys
    depend on the process: only the first one finds its programs again.)

    Every process calls it, before anything is compiled.
    """
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    from fdm_jax.training.agreement import in_all, other_for

    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)  # for what is compiled to agree on it
    enabled = in_all(enabled)
    usual = str(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    folders = [usual, *([str(workdir / ".jax_cache")] if workdir else [])] if enabled else []
    folder = next((each for each in folders if "://" in each or not other_for(Path(each), make=True)), None)
    if folder is not None:
        _keep_in(folder)
        jax.config.update("jax_enable_compilation_cache", True)
    elif enabled and jax.process_index() == 0:
        say(
            f"Compiled programs are not kept: {usual} is not one folder for all processes. JAX_COMPILATION_CACHE_DIR names "
            "another place for them, which may be on gs://."
        )
    reset_cache()  # JAX looks at these settings once


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
