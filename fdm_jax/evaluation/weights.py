"""Files of weights that others made: read, checked, and refused with the reason and the file's checksum."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.interop.snapshots import MissingTorch
from fdm_jax.storage_errors import system_fails


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def weights_of(path: Path, what: str) -> Iterator[None]:
    """For reading a file of weights: whatever goes wrong inside becomes one sentence with the file's sha256.

    Raises:
      UserError: there is no such file, or what was raised inside.
    """
    try:
        path.open("rb").close()
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        yield
    except MissingTorch:
        raise
    except UserError as error:
        raise UserError(f"{path} is not {what}: {error} (its sha256 is {sha256(path)}).") from error
    except Exception as error:  # torch and safetensors have errors of their own for damaged files
        if system_fails(error):
            raise
        reason = f"{reason_of(error)}; its sha256 is {sha256(path)}"
        raise UserError(f"{path} is damaged or incomplete, or not {what} ({reason}).") from error


def check_weights(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Whether ``state`` holds float32 arrays of these names and shapes, all finite, and nothing else.

    Raises:
      UserError: with the first name at which it does not, and no full stop: for :func:`weights_of`.
    """
    for name, shape in shapes.items():
        if name not in state:
            raise UserError(f"the tensor {name} is missing")
        value = state[name]
        if value.shape != shape:
            raise UserError(f"the tensor {name} has shape {list(value.shape)}, where {list(shape)} is right")
        if value.dtype != np.float32:
            raise UserError(f"the tensor {name} is of type {value.dtype}, where float32 is right")
        if not np.isfinite(value).all():
            raise UserError(f"the tensor {name} holds values that are not finite")
    for name in state:
        if name not in shapes:
            raise UserError(f"the network has no place for the tensor {name:.100}")


def reason_of(error: Exception) -> str:
    """The first sentence only: torch goes on with advice to load the file unsafely, in colours."""
    first = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {''.join(filter(str.isprintable, first))[:150]}"
