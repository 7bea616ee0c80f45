"""``fdm``, which is ``python -m fdm_jax``."""

import os
import sys


def start() -> None:
    """The console script."""
    # Before anything else is imported, which may open a file and keep it: libffi does, of ctypes.
    _replace_closed_streams()
    from fdm_jax.cli.main import entry_point

    entry_point()


def _replace_closed_streams() -> None:
    """Where a stream was closed, as by ``2>&-``, /dev/null has its number.

    The next file that is opened, one of a checkpoint perhaps, would else get it, and all that libraries print there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            file = open(os.devnull, mode)
            os.set_inheritable(file.fileno(), True)  # in processes of its own too
            setattr(sys, name, file)


if __name__ == "__main__":
    start()
