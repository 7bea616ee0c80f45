"""Denoising error on held-out images: cheap, quiet, and comparable between families with and without momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from fdm_jax.devices import checked, fetch, in_batches, put


class DenoisingError:
    """EDM-weighted denoising error of models of one kind, compiled once.

    The weight (sigma^2 + d^2) / (sigma d)^2 and the levels are EDM's for every family, so that the figures of
    different families stand beside each other; a denoiser that knows only the images' variance d^2 scores 1.

    Args:
      denoise_fn: D(variables, x [B, H, W, C], sigma [B], labels int [B]), jittable.
      images: [N, H, W, C] in [-1, 1].
      labels: int [N].
      sigma_data: d.
      seed: of the levels and the noise, which are the same at every call.
      batch_size: of the denoiser.
      rows: sharding of a batch, such as over all devices; None for one device.
      check: is given the compiled program before it first runs; None for no check.
    """

    def __init__(
        self, denoise_fn: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array], images: np.ndarray,
        labels: np.ndarray, *, sigma_data: float = 0.5, seed: int = 0, batch_size: int = 256,
        rows: jax.sharding.NamedSharding | None = None,
        check: Callable[[jax.stages.Compiled], None] | None = None,
    ):  # fmt: skip
        self._images, self._labels = np.asarray(images, np.float32), np.asarray(labels, np.int32)
        self._seed, self._batch_size, self._rows = seed, batch_size, rows

        def errors(variables: Any, y: jax.Array, n: jax.Array, sigma: jax.Array, labels: jax.Array) -> jax.Array:
            D_x = denoise_fn(variables, y + sigma[:, None, None, None] * n, sigma, labels)
            weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
            return weight * jnp.mean((D_x - y) ** 2, axis=(1, 2, 3))

        shardings = None if rows is None else (None, rows, rows, rows, rows)
        self._errors = checked(jax.jit(errors, in_shardings=shardings), check)

    def mean(
        self, variables: Any, *, levels: int = 4, P_mean: float = -1.2, P_std: float = 1.2,
        on_batch: Callable[[int], None] | None = None,
    ) -> float:  # fmt: skip
        """The mean over pixels, images and noise levels.

        Args:
          variables: of the model.
          levels: noise levels per image: ln sigma ~ N(P_mean, P_std^2) drawn once in each of so many equal slices of
            the distribution.
          on_batch: called after each batch with how many noised images were in it; what it raises ends the work.
        """
        rng = np.random.default_rng(self._seed)
        quantiles = (np.arange(levels) + rng.random((len(self._images), levels))) / levels
        sigma = np.exp(P_mean + P_std * scipy.special.ndtri(quantiles)).ravel().astype(np.float32)
        return float(self._run(variables, sigma, rng, on_batch=on_batch).mean())

    def by_sigma(
        self, variables: Any, sigmas: Sequence[float], *, on_batch: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """The mean over pixels and images at each of the noise levels, [len(sigmas)]; every level has the same noise.

        ``on_batch`` is that of :meth:`mean`.
        """
        rng = np.random.default_rng(self._seed)
        sigma = np.tile(np.asarray(sigmas, np.float32), len(self._images))
        noise = np.repeat(rng.standard_normal(self._images.shape, dtype=np.float32), len(sigmas), axis=0)
        errors = self._run(variables, sigma, rng, noise, on_batch)
        return errors.reshape(len(self._images), len(sigmas)).mean(axis=0)

    def _run(
        self, variables: Any, sigma: np.ndarray, rng: np.random.Generator, noise: np.ndarray | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Errors [len(sigma)], where each image has so many noise levels in a row."""
        if noise is None:
            noise = rng.standard_normal((len(sigma), *self._images.shape[1:]), dtype=np.float32)
        times = len(sigma) // len(self._images)
        images, labels = np.repeat(self._images, times, axis=0), np.repeat(self._labels, times)
        parts = []
        for rows, part in in_batches(self._batch_size, images, noise, sigma, labels):
            placed = part if self._rows is None else put(part, self._rows)
            parts.append(fetch(self._errors(variables, *placed)).astype(np.float64)[:rows])
            if on_batch is not None:
                on_batch(rows)
        return np.concatenate(parts)


def held_out_error(
    denoise_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], images: np.ndarray, labels: np.ndarray, *,
    levels: int = 4, sigma_data: float = 0.5, P_mean: float = -1.2, P_std: float = 1.2, seed: int = 0, batch_size: int = 256,
) -> float:  # fmt: skip
    """:meth:`DenoisingError.mean` of one denoiser D(x, sigma [B], labels int [B])."""
    error = DenoisingError(
        lambda _, x, sigma, labels: denoise_fn(x, sigma, labels), images, labels,
        sigma_data=sigma_data, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    return error.mean({}, levels=levels, P_mean=P_mean, P_std=P_std)
