"""One integer seed per image decides its latent, its label and its churn noise, whatever is sampled beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.errors import UserError, nearest

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)

# Named, as not every generator that JAX can be set to keeps a draw apart from those vmapped beside it.
GENERATOR = "threefry2x32"

# Separate streams of one seed.
_LATENT, _LABEL, _CHURN, _DEQUANTISE, _PROBE = range(5)


def as_seeds(numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Numbers [B] as uint32.

    Raises:
      UserError: one outside 0 ... 2^32 - 1, which JAX would take for another one without a word; or what is no list of
        integers.
    """
    numbers = np.asarray(numbers)
    if numbers.ndim != 1 or not _are_integers(numbers):
        raise UserError(f"Seeds are a list of integers, [B], and these are {numbers.dtype} {list(numbers.shape)}.")
    for wrong in numbers[(numbers < 0) | (numbers >= 2**32)][:1]:
        raise UserError(f"Seeds go from 0 to {2**32 - 1}, and {wrong} is given.")
    return numbers.astype(np.uint32)


def _are_integers(numbers: np.ndarray) -> bool:
    if numbers.dtype.kind == "O":  # some beyond 64 bits, or anything else
        return all(isinstance(number, int) for number in numbers.flat)
    return numbers.dtype.kind in "iu"


def _keys(seeds: jax.Array, stream: int) -> jax.Array:
    if not isinstance(seeds, jax.Array):
        seeds = as_seeds(seeds)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), stream))(seeds)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Drawn as float32, since float64 draws are others, and given as what JAX computes in by default."""
    return jax.random.normal(key, shape, jnp.float32).astype(float)


def latents(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [B, *shape] for seeds [B]."""
    return jax.vmap(lambda key: _normal(key, shape))(_keys(seeds, _LATENT))


def labels(seeds: jax.Array, num_classes: int) -> jax.Array:
    """A class for each seed, int32 [B], uniform over the classes; -1 for "no class" where there are none."""
    if not num_classes:
        return jnp.full(len(seeds), -1, jnp.int32)
    return jax.vmap(lambda key: jax.random.randint(key, (), 0, num_classes, jnp.int32))(_keys(seeds, _LABEL))


_drawn_labels = jax.jit(labels, static_argnums=1)


def choose_labels(
    chosen: int | str | Sequence[int | str] | np.ndarray | None,
    seeds: np.ndarray,
    num_classes: int,
    class_names: Sequence[str] = (),
) -> np.ndarray:
    """The class of each seed, int32 [B]: the ``chosen`` one, for all or each of them, or without one that of :func:`labels`.

    Classes are chosen by number, or by name where ``class_names`` gives theirs.

    Raises:
      UserError: the model does not know the class, or it is neither integer nor name.
    """
    if chosen is None:
        return jax.device_get(_drawn_labels(jax.device_put(as_seeds(seeds)), num_classes))
    right = f"from 0 to {num_classes - 1}" if num_classes else "left out, since this model knows no classes"
    classes = np.asarray(chosen)
    if classes.dtype.kind == "U":
        for wrong in sorted(set(classes.flat) - set(class_names)):
            if class_names:
                raise UserError(f"The model knows no class {str(wrong)!r}: {nearest(wrong, class_names)}")
            raise UserError(f"The class must be {right}, and is {str(wrong)!r}.")
        numbers = {name: number for number, name in enumerate(class_names)}
        classes = np.array([numbers[name] for name in classes.flat], np.int32).reshape(classes.shape)
    if not _are_integers(classes):
        raise UserError(f"Classes are integers or names, and not {classes.dtype}.")
    for wrong in classes[(classes < 0) | (classes >= num_classes)].flat:
        raise UserError(f"The class must be {right}, and is {wrong}.")
    classes = classes.astype(np.int32)
    return classes if classes.ndim else np.full(len(seeds), classes)


def churn_noise(seeds: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [B, *shape] for the sampler's step."""
    draw = lambda key: _normal(jax.random.fold_in(key, step), shape)  # noqa: E731
    return jax.vmap(draw)(_keys(seeds, _CHURN))


def to_uint8(images: AnyArray) -> AnyArray:
    """[-1, 1] -> clip(x * 127.5 + 128, 0, 255), truncated; where the images are, on a device (JAX) or the host (NumPy)."""
    return (images * 127.5 + 128).clip(0, 255).astype(np.uint8)  # type: ignore[return-value]


def dequantise(images: jax.Array, seeds: jax.Array) -> jax.Array:
    """uint8 [B, H, W, C] -> (value - 1/2 + u) / 127.5 - 1 with u uniform in [0, 1), a draw for each seed."""
    u = jax.vmap(lambda key: jax.random.uniform(key, images.shape[1:], jnp.float32))(_keys(seeds, _DEQUANTISE))
    return (images - 0.5 + u.astype(float)) / 127.5 - 1


def signs(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """-1 or 1, [B, *shape], for Hutchinson's estimate of a trace; decided in float32, as the draws above."""
    positive = jax.vmap(lambda key: jax.random.bernoulli(key, np.float32(0.5), shape))(_keys(seeds, _PROBE))
    return jnp.where(positive, 1.0, -1.0)
