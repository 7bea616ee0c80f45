"""Solvers of the reverse SDE: fresh noise after every step."""

from __future__ import annotations

import math

import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.sampling.linear import Call, Combination, check_grid, euler, step_call


def _check_end(sigmas: np.ndarray) -> np.ndarray:
    sigmas = check_grid(sigmas)
    if sigmas[-1] > 0:
        raise UserError("A stochastic solver's noise levels must end at 0.")
    return sigmas


def ancestral_calls(sigmas: np.ndarray) -> list[Call]:
    """Ancestral Euler: down to sigma_down, then up to sigma_{i+1} with noise (the posterior of DDPM, Ho et al. 2020).

    sigma_up^2 = sigma_{i+1}^2 (sigma_i^2 - sigma_{i+1}^2) / sigma_i^2 and sigma_down^2 = sigma_{i+1}^2 - sigma_up^2.
    """
    sigmas, calls, noise = _check_end(sigmas), [], 0.0
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        up = to * math.sqrt(max(sigma**2 - to**2, 0)) / sigma
        calls.append(step_call(sigma, euler(sigma, math.sqrt(max(to**2 - up**2, 0))), noise, i))
        noise = up  # added before the next call
    return calls


def sde_dpm_calls(sigmas: np.ndarray) -> list[Call]:
    """SDE-DPM-Solver++ 2M (Lu et al., arXiv 2211.01095): the reverse SDE, with past denoised images.

    x_t = e^-2h x + (1 - e^-2h) [D_0 + (D_0 - D_1) / (2 r)] + sigma_t sqrt(1 - e^-2h) eps, with r = h_before / h.
    """
    sigmas, calls, noise, before = _check_end(sigmas), [], 0.0, 0.0
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        if to == 0:
            calls.append(step_call(sigma, euler(sigma, 0.0), noise, i))
            break
        h = math.log(sigma / to)
        share = -math.expm1(-2 * h)
        slope = share * h / before / 2 if before else 0.0
        calls.append(step_call(sigma, Combination(math.exp(-2 * h), (share + slope, -slope)), noise, i))
        noise, before = to * math.sqrt(share), h
    return calls
