"""Time grids: falling noise levels as NumPy float64 arrays, known before anything is compiled."""

from __future__ import annotations

import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.families import Family


def sampling_range(family: Family, sigma_min: float = 0.002, sigma_max: float = 80.0) -> tuple[float, float]:
    """The part of [sigma_min, sigma_max] that lies in the family's own range."""
    return max(sigma_min, family.sigma_min), min(sigma_max, family.sigma_max)


def edm_sigmas(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, then sigma_N = 0.

    Karras et al. 2022, equation 5.  One step goes from sigma_max to 0 at once.

    Returns:
      [num_steps + 1].

    Raises:
      UserError: fewer than one step, or a range that is none.
    """
    if num_steps < 1:
        raise UserError(f"The number of sampling steps must be 1 or more, and is {num_steps}.")
    if not 0 < sigma_min < sigma_max < np.inf:
        raise UserError(f"The noise range must have 0 < sigma_min < sigma_max, and is {sigma_min} to {sigma_max}.")
    ramp = np.linspace(0, 1, num_steps)
    sigmas = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return np.append(sigmas, 0.0)
