"""The host's memory: how much there is, and that the C library keeps it between steps where XLA's CPU programs run."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def machine_memory(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process may have, in bytes: all of the machine's, or what its container or its job is allowed.

    Args:
      groups: of Linux's control groups, those that the process is in.
      mounted: where they and their limits are; a group's limit is also one for all groups within it.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        # Version 2 has one tree, version 1 one for memory.  A container may see its own group as the root of it.
        root, name = (mounted / "memory", "memory.limit_in_bytes") if controllers else (mounted, "memory.max")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
                limits.append(int((folder / name).read_text()))
    return min(limits)


def program_check() -> Callable[[Any], None] | None:
    """:func:`check_program` for all devices of this process; None on accelerators, whose memory is not the host's."""
    import jax  # here, as :func:`keep_freed_memory` is for before JAX starts

    from fdm_jax.devices import ON_HOST

    if jax.default_backend() not in ON_HOST:
        return None
    return functools.partial(check_program, devices=jax.local_device_count())


def check_program(compiled: Any, devices: int) -> None:
    """Raise a MemoryError if a program takes more memory than there is, on devices that are the machine's own CPUs.

    Linux gives memory that it has not, and kills who uses it.

    Args:
      compiled: a ``jax.stages.Compiled``.
      devices: how many of this machine run it.
    """
    if (memory := compiled.memory_analysis()) is None:
        return
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    need, have = devices * (held + memory.temp_size_in_bytes), machine_memory()
    if need > have:
        raise MemoryError(f"the program takes {need / 2**30:,.1f} GiB, and there are {have / 2**30:,.1f} GiB")


def keep_freed_memory() -> bool:
    """Have the C library keep large blocks that are freed, for the next one who asks; returns whether it can.

    XLA on CPUs allocates a program's temporary memory anew at every call.  glibc takes so large a block from the
    kernel and gives it back at the end, so every step pays for the kernel's clearing of all its pages: a fifth of
    the time of a training step of the digits network.  With one heap that is never trimmed the pages stay.
    (Other C libraries have no such switch, and threads that have allocated already keep the heaps they have: call
    it before JAX starts.)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    return mallopt is not None and all([mallopt(name, value) for name, value in settings])
