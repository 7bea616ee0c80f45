"""What several commands ask of their arguments."""

from __future__ import annotations

import argparse

from fdm_jax.errors import UserError


def need_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse these arguments where they are given and less than 1.

    Raises:
      UserError: naming the first of them.
    """
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, and is {value}.")
