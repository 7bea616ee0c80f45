"""The EDM sampler (Karras et al., arXiv 2206.00364, algorithms 1 and 2): Heun's method with optional churn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from fdm_jax.denoiser import DenoiseFn
from fdm_jax.errors import UserError
from fdm_jax.sampling.linear import Call, Combination, check_grid, euler, integrate, step_call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise added back before each step: gamma = min(S_churn / N, sqrt(2) - 1) where S_min <= sigma <= S_max.

    Raises:
      UserError: an amount that is negative or not finite, or a range that is none.
    """

    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = float("inf")
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        for name in ("S_churn", "S_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be 0 or more and finite, and is {getattr(self, name)}.")
        if not 0 <= self.S_min <= self.S_max:
            raise UserError(
                f"Churn must act from a lower to a higher noise level, and not {self.S_min} to {self.S_max}."
            )

    def gamma(self, sigmas: np.ndarray) -> np.ndarray:
        """Relative rise of each noise level of a grid without its final 0."""
        chosen = (self.S_min <= sigmas) & (sigmas <= self.S_max)
        return np.where(chosen, min(self.S_churn / len(sigmas), np.sqrt(2) - 1), 0.0)


def edm_calls(sigmas: np.ndarray, churn: Churn | None = None, heun: bool = True) -> list[Call]:
    """The table of Heun's method, or of Euler's, with churn.

    From x_i, with sigma_hat = sigma_i (1 + gamma_i) and x_hat = x_i + sqrt(sigma_hat^2 - sigma_i^2) S_noise eps_i,
    a step goes along d = (x_hat - D(x_hat; sigma_hat)) / sigma_hat to x' (Euler) and then, unless sigma_{i+1} is
    0, again from x_hat along the mean of d and the slope at x' (Heun).
    """
    sigmas, churn = check_grid(sigmas), churn or Churn()
    sigma, following = sigmas[:-1], sigmas[1:]
    sigma_hat = sigma * (1 + churn.gamma(sigma))
    noise = np.sqrt(np.maximum(sigma_hat**2 - sigma**2, 0)) * churn.S_noise
    calls = []
    for i, (s, to) in enumerate(zip(sigma_hat, following, strict=True)):
        there = euler(s, to)
        if not heun or to == 0:  # at sigma = 0 there is nothing to correct with
            calls.append(step_call(s, there, noise[i], i))
            continue
        calls += heun_step(s, to, noise[i], i)
    return calls


def heun_step(sigma: float, to: float, noise: float = 0.0, step: int = 0) -> list[Call]:
    """Two calls: to ``to`` (which may also be higher than sigma) along the mean of the slopes at both ends."""
    there, h = euler(sigma, to), to - sigma
    # x + h/2 (x - D_1) / sigma + h/2 (x' - D_0) / to, with x' in x and D_1
    of_second = h / 2 / to
    both = Combination(
        1 + h / 2 / sigma + of_second * there.of_anchor,
        (-of_second, of_second * there.of_denoised[0] - h / 2 / sigma),
    )
    return [Call(sigma, there, noise=noise, step=step), step_call(to, both)]


def evaluation_sigmas(sigmas: np.ndarray, churn: Churn | None = None, heun: bool = True) -> np.ndarray:
    """The noise level of every denoiser call in order; their number is the NFE: 2 N - 1 with Heun, N without."""
    return np.array([call.sigma for call in edm_calls(sigmas, churn, heun)])


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
    return integrate(denoise_fn, latents, check_grid(sigmas)[0], edm_calls(sigmas, churn, heun), noise_fn)
