"""The devices that share a batch, as the train step sees them, which runs on each: what they sum, and what they gather."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

WHOLE = -1


@dataclasses.dataclass(frozen=True)
class Axis:
    """Devices under ``jax.pmap`` or ``jax.shard_map``.

    Attributes:
      name: of their axis.
      cuts: like the parameters: the axis along which each is dealt out to them, or :data:`WHOLE` where all have all of it.
        None: so it is with all parameters.
    """

    name: str
    cuts: Any = None

    def gather(self, params: Any, dtype: Any) -> Any:
        """Parameters, of which each device has its part -> whole ones; kernels of convolutions in the network's type.

        The gradient of a whole array, on each device of its own images, becomes that of a device's part, summed over all
        devices, in float32.
        """
        if self.cuts is None:
            return params

        def one(array: jax.Array, cut: int) -> jax.Array:
            return array if cut == WHOLE else _gather(array, self.name, cut, dtype if array.ndim == 4 else array.dtype)

        return jax.tree.map(one, params, self.cuts)

    def sum(self, loss: jax.Array, gradients: Any) -> tuple[jax.Array, Any]:
        """Sums over the devices of each one's loss and gradients; :meth:`gather` has seen to those that are dealt out."""
        if self.cuts is None:
            return jax.lax.psum((loss, gradients), self.name)
        leaves, tree = jax.tree.flatten(gradients)
        places = [i for i, cut in enumerate(jax.tree.leaves(self.cuts)) if cut == WHOLE]
        loss, whole = jax.lax.psum((loss, [leaves[i] for i in places]), self.name)
        for i, summed in zip(places, whole, strict=True):
            leaves[i] = summed
        return loss, jax.tree.unflatten(tree, leaves)

    def total(self, values: Any) -> jax.Array:
        """Sum of one number for each parameter, which is the sum of one for each part where it is dealt out."""
        if self.cuts is None:
            return total(values)
        cuts = jax.tree.leaves(self.cuts)
        of_parts = [value for value, cut in zip(jax.tree.leaves(values), cuts, strict=True) if cut != WHOLE]
        of_whole = [value for value, cut in zip(jax.tree.leaves(values), cuts, strict=True) if cut == WHOLE]
        return jax.lax.psum(total(of_parts), self.name) + total(of_whole)


def total(values: Any) -> jax.Array:
    """Sum of a tree's numbers."""
    return sum(jax.tree.leaves(values), jnp.zeros((), jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(part: jax.Array, name: str, cut: int, dtype: Any) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), name, axis=cut, tiled=True)


def _gather_forward(part: jax.Array, name: str, cut: int, dtype: Any) -> tuple[jax.Array, None]:
    return _gather(part, name, cut, dtype), None


def _gather_backward(name: str, cut: int, dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.psum_scatter(gradient.astype(jnp.float32), name, scatter_dimension=cut, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)
