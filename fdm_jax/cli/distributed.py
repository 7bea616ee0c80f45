"""Several processes as one: ``--distributed``."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from fdm_jax.errors import RestartNeeded, UserError


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    """Add it."""
    parser.add_argument(
        "--distributed", default="off", metavar="HOW", help="several processes share the work: auto (TPU pods, Slurm), or "
        "HOST:PORT,N,I with the first process's address, their number, and which one this is (default: %(default)s)",
    )  # fmt: skip


@contextlib.contextmanager
def joined(how: str) -> Iterator[None]:
    """Join the other processes, and part from them in good order; before anything else is done with JAX.

    Raises:
      UserError: ``how`` cannot be read, or the others do not come.
      RestartNeeded: another process was lost; the block's own is passed on.
    """
    if how == "off":
        yield
        return
    import jax

    _initialise(how)
    try:
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


def _initialise(how: str) -> None:
    import jax

    try:
        if how == "auto":
            jax.distributed.initialize()
            return
        address, count, index = how.split(",")
        if not (0 <= int(index) < int(count) and address.rpartition(":")[2].isdecimal()):
            raise ValueError
        jax.distributed.initialize(address, int(count), int(index))
    except ValueError as error:
        raise UserError(
            "--distributed must be off, auto (where JAX knows the cluster) or HOST:PORT,N,I with I from 0 to N - 1, and is "
            f"{how!r}."
        ) from error
    except RuntimeError as error:
        raise UserError(f"The processes of --distributed={how} did not find each other: {error}") from error
