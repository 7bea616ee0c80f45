"""The training objective: weighted denoising error, with FDM's weight warm-up.

    loss_i = sum over pixels of  min(lambda(sigma_i), clamp(step)) (D(y_i + sigma_i n_i; sigma_i) - y_i)^2

(Wu et al., arXiv 2306.06991, section 4.)  The caller averages over the batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fdm_jax.denoiser import DenoiseFn, per_example
from fdm_jax.families import Family


def clamp(step: jax.Array | int, warmup_steps: int) -> jax.Array:
    """Upper bound of the loss weight: 5 * 100^(step / warmup_steps), infinite from step = warmup_steps on.

    Args:
      step: optimiser steps done before this one; whatever the gradient accumulation.
      warmup_steps: 0 switches the warm-up off.
    """
    step = jnp.asarray(step)
    bound = 5.0 * 100.0 ** (step / max(warmup_steps, 1))
    return jnp.where(step < warmup_steps, bound, jnp.inf)


def loss_weight(family: Family, sigma: jax.Array, step: jax.Array | int, warmup_steps: int) -> jax.Array:
    """min(lambda(sigma), clamp(step)), of sigma's shape."""
    return jnp.minimum(family.weight(sigma), clamp(step, warmup_steps))


def denoising_loss(
    denoise_fn: DenoiseFn, images: jax.Array, sigma: jax.Array, noise: jax.Array, weight: jax.Array
) -> jax.Array:
    """Weighted squared error of one denoising step for each example.

    Args:
      denoise_fn: D(x, sigma) -> estimate of the clean images.
      images: [B, H, W, C], in [-1, 1].
      sigma: [B], noise levels.
      noise: [B, H, W, C], standard normal.
      weight: [B], see :func:`loss_weight`.

    Returns:
      [B], summed over pixels and channels.
    """
    D_x = denoise_fn(images + per_example(sigma, images) * noise, sigma)
    return weight * jnp.sum((D_x - images) ** 2, axis=tuple(range(1, images.ndim)))
