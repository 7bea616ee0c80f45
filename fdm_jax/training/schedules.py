"""What changes over a run, as functions of the images seen before the step."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def images_after(steps: jax.Array, batch_size: int) -> jax.Array:
    """Images seen after so many steps, float32: as an int32 they would turn negative at 2^31."""
    return steps.astype(jnp.float32) * batch_size


def learning_rate(nimg: jax.Array, peak: float, rampup_images: float) -> jax.Array:
    """peak * min(nimg / rampup_images, 1); the first step has rate 0, as in EDM."""
    return peak * jnp.minimum(nimg / max(rampup_images, 1e-8), 1.0)


def ema_beta(nimg: jax.Array, batch_size: int, halflife_images: float, rampup_ratio: float | None = 0.05) -> jax.Array:
    """0.5^(batch_size / max(h, 1e-8)), h = min(halflife_images, nimg * rampup_ratio).

    Args:
      nimg: images seen before the step.
      batch_size: images per step.
      halflife_images: half-life of the average.
      rampup_ratio: share of the images seen that bounds the half-life early on; None for no bound.
    """
    halflife = jnp.asarray(halflife_images, jnp.float32)
    if rampup_ratio is not None:
        halflife = jnp.minimum(halflife, nimg * rampup_ratio)
    return 0.5 ** (batch_size / jnp.maximum(halflife, 1e-8))
