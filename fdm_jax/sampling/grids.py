"""Time grids: falling noise levels as NumPy float64 arrays, known before anything is compiled."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.families import Family

MAX_STEPS = 100_000  # a hundred times those that samplers take; far more would fill the memory


def sampling_range(family: Family, sigma_min: float = 0.002, sigma_max: float = 80.0) -> tuple[float, float]:
    """The part of [sigma_min, sigma_max] that lies in the family's own range."""
    return max(sigma_min, family.sigma_min), min(sigma_max, family.sigma_max)


def edm_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then sigma_N = 0.

    Karras et al. 2022, equation 5.  One step goes from sigma_max to 0 at once.

    Returns:
      [num_steps + 1].

    Raises:
      UserError: fewer than one step or more than 100,000, a range that is none, or a rho that is 0, not finite, or of a
        size that loses the ends of the range in rounding.
    """
    _check(num_steps, sigma_min, sigma_max)
    if not (rho and math.isfinite(rho)):
        raise UserError(f"rho must be a finite number other than 0, and is {rho}; EDM's is 7.")
    ramp = np.linspace(0, 1, num_steps)
    with np.errstate(all="ignore"):
        high, low = np.array([sigma_max, sigma_min]) ** (1 / rho)
        sigmas = (high + ramp * (low - high)) ** rho
    if not np.allclose(sigmas[[0, -1]], (sigma_max, sigma_min if num_steps > 1 else sigma_max), rtol=1e-3, atol=0):
        raise UserError(f"rho is {rho}, with which the noise levels cannot be computed; EDM's is 7.")
    return np.append(sigmas, 0.0)


def log_snr_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> np.ndarray:
    """ln sigma falls evenly from sigma_max to sigma_min, then sigma_N = 0 (Lu et al. 2022, "logSNR").

    Returns, raises: as :func:`edm_sigmas`.
    """
    _check(num_steps, sigma_min, sigma_max)
    return np.append(np.geomspace(sigma_max, sigma_min, num_steps), 0.0)


def vp_time_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, power: float = 1.0,
    beta_min: float = 0.1, beta_d: float = 19.9,
) -> np.ndarray:  # fmt: skip
    """t^(1/power) falls evenly, where t is the time of the variance-preserving process; then sigma_N = 0.

    sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 (Song et al. 2021); power 1 is uniform in time, power 2 DDIM's
    quadratic spacing.

    Returns, raises: as :func:`edm_sigmas`.
    """
    _check(num_steps, sigma_min, sigma_max)
    L = np.log1p(np.array([sigma_max, sigma_min]) ** 2)
    first, last = 2 * L / (np.sqrt(beta_min**2 + 2 * beta_d * L) + beta_min)
    t = np.linspace(first ** (1 / power), last ** (1 / power), num_steps) ** power
    sigmas = np.sqrt(np.expm1(t * (0.5 * beta_d * t + beta_min)))
    sigmas[0], sigmas[-1] = sigma_max, sigma_min if num_steps > 1 else sigma_max
    return np.append(sigmas, 0.0)


def _check(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    check_steps(num_steps)
    check_range(sigma_min, sigma_max)


def check_steps(num_steps: int) -> None:
    """Raise a UserError unless 1 <= num_steps <= MAX_STEPS."""
    if not 1 <= num_steps <= MAX_STEPS:
        raise UserError(f"The number of sampling steps must be from 1 to {MAX_STEPS:,}, and is {num_steps}.")


def check_range(sigma_min: float, sigma_max: float) -> None:
    """Raise a UserError unless 0 < sigma_min < sigma_max."""
    if not 0 < sigma_min < sigma_max < np.inf:
        raise UserError(f"The noise range must have 0 < sigma_min < sigma_max, and is {sigma_min} to {sigma_max}.")


# Name -> function of (points, sigma_min, sigma_max); each gives so many levels, and 0 after them.
GRIDS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "edm": edm_sigmas,
    "log-snr": log_snr_sigmas,
    "vp-uniform": vp_time_sigmas,
    "vp-quadratic": lambda points, low, high: vp_time_sigmas(points, low, high, 2.0),
}
