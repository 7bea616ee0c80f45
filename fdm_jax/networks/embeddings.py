"""Embeddings of the noise level: c_noise [B] -> [B, channels], sine half first."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

# The embeddings are computed in float32 whatever the network computes in: c_noise reaches 999 for VP, and a
# bfloat16 has 8 bits of it.


def positional_embedding(c_noise: jax.Array, channels: int) -> jax.Array:
    """sin and cos of c_noise times the frequencies 10000^(-i / (channels/2 - 1))."""
    half = channels // 2
    freqs = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angles = c_noise.astype(jnp.float32)[:, None] * freqs[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_embedding(c_noise: jax.Array, freqs: jax.Array) -> jax.Array:
    """sin and cos of 2 pi f c_noise for the given frequencies [channels / 2]."""
    angles = c_noise.astype(jnp.float32)[:, None] * (2 * jnp.pi * freqs)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class FourierEmbedding(nn.Module):
    """Random frequencies 16 N(0, 1), drawn once.  They sit in the collection "constants": saved, never trained."""

    channels: int

    @nn.compact
    def __call__(self, c_noise: jax.Array) -> jax.Array:
        freqs = self.variable(
            "constants",
            "freqs",
            lambda: 16 * jax.random.normal(self.make_rng("params"), (self.channels // 2,), jnp.float32),
        )
        return fourier_embedding(c_noise, freqs.value)
