"""Models of the PyTorch originals, in and out."""

from fdm_jax.interop.models import Model, load_snapshot

__all__ = ["Model", "load_snapshot"]
