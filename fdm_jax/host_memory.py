"""The host's memory: how much there is, and that the C library keeps it between steps where XLA's CPU programs run."""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def machine_memory() -> int:
    """All that this machine has, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


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
