"""Several processes as one: ``--distributed``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdm_jax.cli.compile_cache import share_compile_cache
from fdm_jax.errors import RESTART_CODE, RestartNeeded, UserError

PATIENCE = 300  # seconds that a process waits for the others to come; JAX's default


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    """Add it."""
    parser.add_argument(
        "--distributed", default="off", metavar="HOW", help="several processes share the work: auto (TPU pods, Slurm), or "
        "HOST:PORT,N,I with the first process's address, their number, and which one this is (default: %(default)s)",
    )  # fmt: skip


@contextlib.contextmanager
def joined(how: str, workdir: Path | None, *, leave_on_sigterm: bool = False) -> Iterator[None]:
    """Join the other processes, and part from them in good order; before anything else is done with JAX.

    Args:
      how: the argument.
      workdir: the run's, if there is one: see :func:`~fdm_jax.cli.compile_cache.share_compile_cache`.
      leave_on_sigterm: for work that is kept piece by piece: end at once on SIGTERM, which JAX would else keep to itself
        for those who ask its service.

    Raises:
      UserError: ``how`` cannot be read, its port is taken, or it is auto where JAX knows no cluster.
      RestartNeeded: another process was lost; the block's own is passed on.
    """
    if how == "off":
        yield
        return
    import jax

    _initialise(how)
    if leave_on_sigterm:
        signal.signal(signal.SIGTERM, _leave)
    try:
        share_compile_cache(workdir)
        _connect()
        yield
    except RestartNeeded as error:
        if not isinstance(error, ProcessLost):
            jax.distributed.shutdown()  # waits for the others, which would else miss the first one and be ended for it
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 and lost_another(error):
            raise ProcessLost(error) from error
        raise
    else:
        jax.distributed.shutdown()


def _connect() -> None:
    """A sum over all devices.

    The first one connects them, and (on CPUs) gives those up that do not come within half a minute.  Here all are ready
    for it; later ones wait for whoever has something to do first, such as to compile, or for a lock.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fdm_jax.devices import make_mesh, sharded

    each = jax.make_array_from_process_local_data(sharded(make_mesh()), np.ones(jax.local_device_count(), np.int32))
    jax.block_until_ready(jax.jit(jnp.sum)(each))


def _leave(number: int, frame: Any) -> None:
    print("fdm: stopped by SIGTERM; the same command goes on from here.", file=sys.stderr, flush=True)
    os._exit(RESTART_CODE)  # at once: the others may never come to where processes part


def leave_together(seconds: float = 30) -> None:
    """Before an end for what the user can mend, which as a rule all processes find: wait until they end too.

    The first one holds the service that connects them, and those that have not said yet what is wrong would be aborted
    when it is gone.

    Args:
      seconds: to wait at most: one may have found alone what is wrong.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        return

    def part() -> None:
        with contextlib.suppress(RuntimeError):  # the others are gone already
            jax.distributed.shutdown()

    parting = threading.Thread(target=part, daemon=True)
    parting.start()
    parting.join(seconds)


def wait_for_all(what: str) -> None:
    """Until every process has come here; ``what`` names the place."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(what)  # nothing where there is one process


class ProcessLost(RestartNeeded):
    """One of several processes does not answer any more."""

    def __init__(self, error: Exception):
        reason = " ".join(str(error).split())[:200]
        super().__init__(
            f"another process was lost ({reason}): start all of them again with the same command, to go on from the newest "
            "checkpoint."
        )


def lost_another(error: Exception) -> bool:
    """Whether an error of JAX's runtime is one of communication; those of memory, arguments and code are not."""
    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION: Buffer")
    return not str(error).startswith(own)


def _check_free(how: str, port: int) -> None:
    """Raise a UserError if the first process cannot listen there: JAX would crash, or share the port of another run."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not matter
            probe.bind(("", port))
    except (OSError, OverflowError) as error:
        raise UserError(
            f"The first process of --distributed={how} cannot listen at port {port} ({getattr(error, 'strerror', error)}): give "
            "one that is free."
        ) from error


def _initialise(how: str) -> None:
    import jax

    arguments: dict[str, Any] = {}
    if how != "auto":
        try:
            address, count, index = how.split(",")
            if not (0 <= int(index) < int(count) and address.rpartition(":")[2].isdecimal()):
                raise ValueError
        except ValueError as error:
            raise UserError(
                "--distributed must be off, auto (where JAX knows the cluster) or HOST:PORT,N,I with I from 0 to N - 1, and "
                f"is {how!r}."
            ) from error
        arguments = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        if int(index) == 0:
            _check_free(how, int(address.rpartition(":")[2]))
    # Said before, as nobody can afterwards: JAX aborts a program that has waited in vain, with a page of C++ stack.
    print(f"Waiting for the other processes of --distributed={how}, {PATIENCE} s at most.", flush=True)
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        if how == "auto":
            raise UserError(
                f"--distributed=auto found no cluster that JAX knows, such as a TPU pod or Slurm ({error}): give "
                "HOST:PORT,N,I, or leave it out."
            ) from error
        raise UserError(f"The processes of --distributed={how} did not find each other: {error}") from error
