"""Denoising error on held-out images: cheap, quiet, and comparable between families with and without momentum."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats


def held_out_error(
    denoise_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    levels: int = 4,
    sigma_data: float = 0.5,
    P_mean: float = -1.2,
    P_std: float = 1.2,
    seed: int = 0,
    batch_size: int = 256,
) -> float:
    """EDM-weighted denoising error, a mean over pixels, images and noise levels.

    The weight (sigma^2 + d^2) / (sigma d)^2 and the levels are EDM's for every family, so that the figures of
    different families stand beside each other; a denoiser that knows only the images' variance d^2 scores 1.

    Args:
      denoise_fn: D(x [B, H, W, C], sigma [B], labels int [B]), jittable.
      images: [N, H, W, C] in [-1, 1].
      labels: int [N].
      levels: noise levels per image: ln sigma ~ N(P_mean, P_std^2) drawn once in each of so many equal slices of
        the distribution.
      seed: of the levels and the noise, which are the same at every call.
    """
    rng = np.random.default_rng(seed)
    quantiles = (np.arange(levels) + rng.random((len(images), levels))) / levels
    sigma = np.exp(P_mean + P_std * scipy.stats.norm.ppf(quantiles)).ravel().astype(np.float32)
    noise = rng.standard_normal((len(sigma), *images.shape[1:]), dtype=np.float32)
    images = np.repeat(np.asarray(images, np.float32), levels, axis=0)
    labels = np.repeat(np.asarray(labels, np.int32), levels)

    @jax.jit
    def errors(y: jax.Array, n: jax.Array, sigma: jax.Array, labels: jax.Array) -> jax.Array:
        D_x = denoise_fn(y + sigma[:, None, None, None] * n, sigma, labels)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        return weight * jnp.mean((D_x - y) ** 2, axis=(1, 2, 3))

    total = 0.0
    for start in range(0, len(sigma), batch_size):
        part = [a[start : start + batch_size] for a in (images, noise, sigma, labels)]
        n = len(part[0])
        padded = [np.pad(a, [(0, batch_size - n)] + [(0, 0)] * (a.ndim - 1), mode="edge") for a in part]
        total += float(np.sum(np.asarray(errors(*padded), np.float64)[:n]))
    return total / len(sigma)
