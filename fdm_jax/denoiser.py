"""D(x; sigma): a family wrapped around a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from fdm_jax.errors import UserError
from fdm_jax.families import Family


class DenoiseFn(Protocol):
    """What objectives and samplers work on: the best guess of y given x = y + sigma n."""

    def __call__(self, x: jax.Array, sigma: jax.Array, /) -> jax.Array:
        """x is [B, H, W, C], sigma a scalar or [B]; the result has x's shape."""
        ...


def per_example(values: jax.Array, like: jax.Array) -> jax.Array:
    """One number per example, [B], as [B, 1, ...], which multiplies arrays of ``like``'s rank."""
    return jnp.expand_dims(values, range(1, like.ndim))


def make_denoise_fn(family: Family, network: Callable[..., Any]) -> Callable[..., jax.Array]:
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise, ...), computed in float32 around F (float64 if x is).

    Args:
      family: gives the coefficients.
      network: F(x [B, H, W, C], c_noise [B], ...) -> [B, H, W, C]; any compute type of its own.

    Returns:
      ``denoise(x, sigma, *args, **kwargs)``; sigma is a scalar or [B], further arguments go to the network
      as they are (class_labels, augment_labels, ...); a UserError is raised if sigma is of another shape, or F's
      result has not x's.
    """

    def denoise(x: jax.Array, sigma: jax.Array | float, *args: Any, **kwargs: Any) -> jax.Array:
        x = jnp.asarray(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        sigma = jnp.asarray(sigma, x.dtype)
        if sigma.shape not in ((), x.shape[:1]):
            raise UserError(
                f"sigma is a number, or one for each of the {len(x)} images, [{len(x)}], and is {list(sigma.shape)}."
            )
        sigma = jnp.broadcast_to(sigma, x.shape[:1])
        c = family.coefficients(sigma)
        c_skip, c_out, c_in = (per_example(coefficient, x) for coefficient in (c.c_skip, c.c_out, c.c_in))
        F_x = network(c_in * x, c.c_noise, *args, **kwargs)
        if F_x.shape != x.shape:
            raise UserError(
                f"The network gives {list(F_x.shape)} for images of {list(x.shape)}, and must give the same."
            )
        return c_skip * x + c_out * F_x.astype(x.dtype)

    return denoise
