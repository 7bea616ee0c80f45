"""Models of the PyTorch originals, in and out."""

from fdm_jax.interop.models import load_snapshot
from fdm_jax.model import Model

__all__ = ["Model", "load_snapshot"]
