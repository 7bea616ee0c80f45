"""The EDM sampler (Karras et al., arXiv 2206.00364, algorithms 1 and 2): Heun's method with optional churn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.denoiser import DenoiseFn
from fdm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise added back before each step: gamma = min(S_churn / N, sqrt(2) - 1) where S_min <= sigma <= S_max."""

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = float("inf")
    S_noise: float = 1.0

    def gamma(self, sigmas: np.ndarray) -> np.ndarray:
        """Relative rise of each noise level of a grid without its final 0."""
        chosen = (self.S_min <= sigmas) & (sigmas <= self.S_max)
        return np.where(chosen, min(self.S_churn / len(sigmas), np.sqrt(2) - 1), 0.0)


class _Evaluation(NamedTuple):
    """One call of the denoiser; the fields are columns of a table with a row per call."""

    sigma: Any  # where D is called
    h: Any  # sigma_{i+1} - sigma_hat_i, the length of the step that the call belongs to
    noise: Any  # standard deviation of the noise put on x before the call
    step: Any  # i
    corrects: Any  # whether this is the second call of a Heun step


def _table(sigmas: np.ndarray, churn: Churn, heun: bool) -> _Evaluation:
    sigma, following = sigmas[:-1], sigmas[1:]
    sigma_hat = sigma * (1 + churn.gamma(sigma))
    noise = np.sqrt(np.maximum(sigma_hat**2 - sigma**2, 0)) * churn.S_noise
    rows = []
    for i in range(len(sigma)):
        h = following[i] - sigma_hat[i]
        rows.append((sigma_hat[i], h, noise[i], i, False))
        if heun and following[i] > 0:  # at sigma = 0 there is nothing to correct with
            rows.append((following[i], h, 0.0, i, True))
    return _Evaluation(*(np.asarray(column) for column in zip(*rows, strict=True)))


def evaluation_sigmas(sigmas: np.ndarray, churn: Churn | None = None, heun: bool = True) -> np.ndarray:
    """The noise level of every denoiser call in order; their number is the NFE: 2 N - 1 with Heun, N without."""
    return _table(np.asarray(sigmas, np.float64), churn or Churn(), heun).sigma


def edm_sample(
    denoise_fn: DenoiseFn,
    latents: jax.Array,
    sigmas: np.ndarray,
    *,
    churn: Churn | None = None,
    noise_fn: Callable[[jax.Array], jax.Array] | None = None,
    heun: bool = True,
) -> jax.Array:
    """Integrate dx/dsigma = (x - D(x; sigma)) / sigma from sigmas[0] down to sigmas[-1].

    From x_i, with sigma_hat = sigma_i (1 + gamma_i) and x_hat = x_i + sqrt(sigma_hat^2 - sigma_i^2) S_noise eps_i,
    a step goes along d = (x_hat - D(x_hat; sigma_hat)) / sigma_hat to x' (Euler) and then, unless sigma_{i+1} is
    0, again from x_hat along the mean of d and the slope at x' (Heun).

    The calls of the denoiser, not the steps, are what is scanned over: the network is compiled once.

    Args:
      denoise_fn: D(x, sigma) with sigma a scalar.
      latents: standard normal, [B, H, W, C]; their type is what is computed in.
      sigmas: falling noise levels, concrete numbers (see :mod:`fdm_jax.sampling.grids`); a last 0 ends at D's best guess.
      churn: noise to add on the way; None for the deterministic ODE.
      noise_fn: gives eps_i, of latents' shape, for the step i; needed only with churn.
      heun: False for Euler's method (which is DDIM).

    Returns:
      Images like the latents.

    Raises:
      UserError: churn without noise_fn, or a grid that does not fall.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if sigmas.ndim != 1 or len(sigmas) < 2 or not (np.diff(sigmas) < 0).all() or sigmas[-1] < 0:
        raise UserError("The noise levels of a sampler must fall strictly and end at 0 or above.")
    table = _table(sigmas, churn or Churn(), heun)
    stochastic = bool((table.noise > 0).any())
    if stochastic and noise_fn is None:
        raise UserError("Churn needs a noise_fn that gives the noise of each step.")
    dtype = latents.dtype
    table = _Evaluation(*(jnp.asarray(column, dtype if column.dtype == np.float64 else None) for column in table))

    def evaluate(carry: tuple[jax.Array, jax.Array, jax.Array], row: _Evaluation):  # type: ignore[no-untyped-def]
        x, x_hat, d = carry
        if stochastic:
            assert noise_fn is not None
            draw = noise_fn
            x = x + jax.lax.cond(
                row.noise > 0, lambda: row.noise * draw(row.step).astype(dtype), lambda: jnp.zeros_like(x)
            )
        slope = (x - denoise_fn(x, row.sigma)) / row.sigma
        x_hat = jnp.where(row.corrects, x_hat, x)
        direction = jnp.where(row.corrects, (d + slope) / 2, slope)
        return (x_hat + row.h * direction, x_hat, slope), None

    x = latents * jnp.asarray(sigmas[0], dtype)
    (x, _, _), _ = jax.lax.scan(evaluate, (x, x, jnp.zeros_like(x)), table)
    return x
