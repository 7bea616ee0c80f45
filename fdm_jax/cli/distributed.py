"""Several processes as one: ``--distributed``."""

from __future__ import annotations

import argparse

from fdm_jax.errors import UserError


def add_distributed_argument(parser: argparse.ArgumentParser) -> None:
    """Add it."""
    parser.add_argument(
        "--distributed", default="off", metavar="HOW", help="several processes share the work: auto (TPU pods, Slurm), or "
        "HOST:PORT,N,I with the first process's address, their number, and which one this is (default: %(default)s)",
    )  # fmt: skip


def initialise(how: str) -> None:
    """Join the other processes; before anything else is done with JAX.

    Raises:
      UserError: ``how`` cannot be read, or the others do not come.
    """
    if how == "off":
        return
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
