"""Trained models, wherever they are: runs, files for PyTorch users, snapshots of the PyTorch originals."""

from fdm_jax.interop.files import load_model
from fdm_jax.interop.models import load_snapshot
from fdm_jax.model import Model

__all__ = ["Model", "load_model", "load_snapshot"]
