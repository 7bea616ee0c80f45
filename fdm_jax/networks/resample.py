"""Doubling and halving of images with a small FIR filter, one axis at a time.

A filter f of even length K, normalised to sum 1, is applied along each of the two axes; together that is
the depthwise convolution with the outer product of f with itself:

    down   y[i] = sum_k f[k] x[2 i + k - pad]                     stride-2 convolution
    up     y[j] = sum_k 2 f[k] x[(j + pad - k) / 2]               stride-2 transposed convolution (integer places)

Outside the image x is 0, and pad = (K - 2) / 2 unless given.  Written as sums of slices: XLA fuses them into one
pass, while depthwise convolutions of such short filters (and their gradients) are slow on every backend.  On TPUs they
are products with matrices instead: by their compiler's count, slices in steps of two and what is put together of them
take twice the time of the convolutions of a block that doubles its image with [1, 3, 3, 1], and the products under half.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def _taps(filter_taps: Sequence[float]) -> list[float]:
    total = sum(filter_taps)
    return [tap / total for tap in filter_taps]


def _pad(filter_taps: Sequence[float], pad: int | None) -> int:
    return (len(filter_taps) - 1) // 2 if pad is None else pad


def _pad_axis(x: jax.Array, axis: int, before: int, after: int) -> jax.Array:
    """Zero padding; a negative amount crops."""
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (before, after, 0)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), config)


def _weighted(x: jax.Array, weight: float) -> jax.Array:
    return x * jnp.asarray(weight, x.dtype)


def downsample(x: jax.Array, filter_taps: Sequence[float] = (1, 1), pad: int | None = None) -> jax.Array:
    """Halve height and width of x [B, H, W, C]; [1, 1] is the 2x2 mean."""
    taps, pad = _taps(filter_taps), _pad(filter_taps, pad)
    height, width = (halving_matrix(x.shape[axis], taps, pad) for axis in (1, 2))
    return jax.lax.platform_dependent(
        x, tpu=lambda x: by_matrices(x, height, width), default=lambda x: _sums_of_slices(x, taps, pad)
    )


def upsample(x: jax.Array, filter_taps: Sequence[float] = (1, 1), pad: int | None = None) -> jax.Array:
    """Double height and width of x [B, H, W, C]; [1, 1] repeats every pixel."""
    taps, pad = _taps(filter_taps), _pad(filter_taps, pad)
    height, width = (doubling_matrix(x.shape[axis], taps, pad) for axis in (1, 2))
    return jax.lax.platform_dependent(
        x, tpu=lambda x: by_matrices(x, height, width), default=lambda x: _interleaved(x, taps, pad)
    )


def halving_matrix(size: int, taps: Sequence[float], pad: int) -> np.ndarray:
    """The matrix [size', size] of :func:`downsample` along one axis."""
    rows = (size + 2 * pad - len(taps)) // 2 + 1
    matrix = np.zeros((rows, size + 2 * pad))
    for i in range(rows):
        matrix[i, 2 * i : 2 * i + len(taps)] = taps
    return matrix[:, pad : pad + size]


def doubling_matrix(size: int, taps: Sequence[float], pad: int) -> np.ndarray:
    """The matrix [size', size] of :func:`upsample` along one axis: twice the transpose of the one that halves size'."""
    return 2 * halving_matrix(2 * (size - 1) + len(taps) - 2 * pad, taps, pad).T


def by_matrices(x: jax.Array, height: np.ndarray, width: np.ndarray) -> jax.Array:
    """x [B, H, W, C] times matrices [H', H] and [W', W] -> [B, H', W', C]."""
    # The highest precision is float32's own; bfloat16 is summed in float32 by any.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = product("ih,bhwc->biwc", jnp.asarray(height, x.dtype), x)
    return product("jw,biwc->bijc", jnp.asarray(width, x.dtype), x)


def _sums_of_slices(x: jax.Array, taps: Sequence[float], pad: int) -> jax.Array:
    for axis in (1, 2):
        size = (x.shape[axis] + 2 * pad - len(taps)) // 2 + 1
        padded = _pad_axis(x, axis, pad, pad)
        x = functools.reduce(
            jnp.add,
            (_weighted(jax.lax.slice_in_dim(padded, k, k + 2 * size - 1, 2, axis), tap) for k, tap in enumerate(taps)),
        )
    return x


def _interleaved(x: jax.Array, taps: Sequence[float], pad: int) -> jax.Array:
    if taps == [0.5, 0.5] and pad == 0:  # the same sums as copies
        B, H, W, C = x.shape
        return jnp.broadcast_to(x[:, :, None, :, None, :], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
    half = len(taps) // 2
    for axis in (1, 2):
        n = x.shape[axis]
        # Even and odd outputs of the full transposed convolution each see every second tap.
        padded = _pad_axis(x, axis, half - 1, half - 1)
        shifted = [jax.lax.slice_in_dim(padded, half - 1 - j, n + 2 * half - 2 - j, 1, axis) for j in range(half)]
        phases = [
            functools.reduce(jnp.add, (_weighted(part, 2 * taps[2 * j + phase]) for j, part in enumerate(shifted)))
            for phase in (0, 1)
        ]
        full = jnp.stack(phases, axis=axis + 1)
        full = full.reshape(*x.shape[:axis], 2 * (n + half - 1), *x.shape[axis + 1 :])
        x = _pad_axis(full, axis, -pad, -pad)
    return x
