"""Editing: what is known of an image is put into the denoiser, or into where the sampler starts.

A denoiser whose guess is corrected to agree with what is known gives, under every solver, samples that agree with it: the
ODE then takes the known part from known + sigma n straight to itself.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.denoiser import DenoiseFn
from fdm_jax.errors import UserError
from fdm_jax.sampling.edm import heun_step
from fdm_jax.sampling.linear import Call, check_grid, euler, integrate, step_call

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def inpaint(denoise_fn: DenoiseFn, known: jax.Array, mask: jax.Array) -> DenoiseFn:
    """Make what the mask covers, keep the rest.

    Args:
      denoise_fn: D(x, sigma).
      known: images in [-1, 1], [B, H, W, C].
      mask: 1 where pixels are to be made and 0 where they are kept, [H, W, 1] or another shape that broadcasts to the images'.

    Raises:
      UserError: the mask does not fit the images.
    """
    # To the images' shape, and not both to a third, as [H, W] and images of one channel would be.
    fits = zip(mask.shape[::-1], known.shape[::-1], strict=False)
    if mask.ndim > known.ndim or not all(size in (1, wanted) for size, wanted in fits):
        raise UserError(f"The mask is {list(mask.shape)}, which does not fit images of {list(known.shape)}.")
    mask = mask.reshape((1,) * (known.ndim - mask.ndim) + mask.shape)
    return lambda x, sigma: mask * denoise_fn(x, sigma) + (1 - mask) * known


def resampling_calls(sigmas: np.ndarray, repeats: int, heun: bool = True) -> list[Call]:
    """Heun's or Euler's table that goes over each step several times: down, noised up again, and down again.

    What was made gets the chance to agree with what is known around it (RePaint, Lugmayr et al., arXiv 2201.09865). The
    last step, to 0, is gone once. NFE are ``repeats`` times those of the others.

    Raises:
      UserError: fewer repeats than one.
    """
    if repeats < 1:
        raise UserError(f"Each step must be gone over once or more, and not {repeats} times.")
    sigmas, calls, draws = check_grid(sigmas), [], 0
    for sigma, to in zip(sigmas[:-1], sigmas[1:], strict=True):
        for repeat in range(repeats if to > 0 else 1):
            noise = float(np.sqrt(sigma**2 - to**2)) if repeat else 0.0  # what leads from ``to`` up to sigma
            if heun and to > 0:
                calls += heun_step(sigma, to, noise, draws)
            else:
                calls.append(step_call(sigma, euler(sigma, to), noise, draws))
            draws += 1
    return calls


def colorise(denoise_fn: DenoiseFn, grey: jax.Array) -> DenoiseFn:
    """Keep the luma, make the colours: the guess is moved by the least that gives it the luma ``grey`` [B, H, W, 1].

    Raises:
      UserError: grey has not one channel.
    """
    if grey.shape[-1] != 1:
        raise UserError(f"Colorisation starts from images with 1 channel, and these have {grey.shape[-1]}.")
    luma = jnp.asarray(LUMA, grey.dtype).reshape((1,) * (grey.ndim - 1) + (-1,))

    def denoise(x: jax.Array, sigma: jax.Array, /) -> jax.Array:
        D = denoise_fn(x, sigma)
        return D + (grey - jnp.sum(luma * D, axis=-1, keepdims=True)) * luma / jnp.sum(luma**2)

    return denoise


def encode(denoise_fn: DenoiseFn, images: jax.Array, sigmas: np.ndarray) -> jax.Array:
    """The latents from which the probability-flow ODE leads to images: Heun's method from low noise to high.

    Args:
      denoise_fn: D(x, sigma).
      images: [B, H, W, C] in [-1, 1].
      sigmas: the falling grid of the way back; a 0 at its end is left out.

    Returns:
      Latents like the images, about standard normal for images like those that the model was trained on.

    Raises:
      UserError: fewer than two noise levels.
    """
    rising = check_grid(sigmas)[::-1]
    rising = rising[1:] if rising[0] == 0 else rising
    if len(rising) < 2:
        raise UserError("Encoding needs two noise levels or more.")
    calls = [call for low, high in zip(rising[:-1], rising[1:], strict=True) for call in heun_step(low, high)]
    return integrate(denoise_fn, images, 1.0, calls) / float(rising[-1])


def start_from(
    images: jax.Array, noise: jax.Array, sigmas: np.ndarray, strength: float
) -> tuple[jax.Array, np.ndarray]:
    """Image to image: noise an image up to a level of the grid, and go on from there.

    Args:
      images, noise: [B, H, W, C].
      sigmas: the falling grid of the whole way.
      strength: share of the steps that are gone: 1 is the whole way (little of the image stays), near 0 the last step.

    Returns:
      Latents, to be multiplied by the first level, and the rest of the grid.

    Raises:
      UserError: a strength that is no share.
    """
    sigmas = check_grid(sigmas)
    if not 0 < strength <= 1:
        raise UserError(f"The strength must be above 0 and at most 1, and is {strength}.")
    steps = max(round(strength * (len(sigmas) - 1)), 1)
    rest = sigmas[len(sigmas) - 1 - steps :]
    return noise + images / float(rest[0]), rest


def interpolate(first: jax.Array, second: jax.Array, t: jax.Array | float) -> jax.Array:
    """Latents between two: cos(t pi/2) first + sin(t pi/2) second, which keeps independent normal ones normal."""
    angle = jnp.asarray(t) * (jnp.pi / 2)
    return jnp.cos(angle) * first + jnp.sin(angle) * second
