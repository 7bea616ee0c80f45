"""DPM-Solver++ (Lu et al., arXiv 2211.01095), data prediction in sigma space: alpha = 1, lambda = -ln sigma.

A step goes from s to t with h = lambda_t - lambda_s, so that e^-h = sigma_t / sigma_s.
"""

from __future__ import annotations

import math

import numpy as np

from fdm_jax.sampling.linear import Call, Combination, check_grid, euler, step_call


def singlestep_orders(evaluations: int) -> list[int]:
    """The orders of the steps that spend so many evaluations: 3 as often as can be, then what is left.

    Their number is K = n // 3 + 1: for n % 3 = 0 3, ..., 3, 2, 1; for 1 3, ..., 3, 1; for 2 3, ..., 3, 2.
    """
    threes, rest = divmod(evaluations, 3)
    if rest == 0:
        return [3] * (threes - 1) + [2, 1]
    return [3] * threes + [rest]


def singlestep_calls(sigmas: np.ndarray, orders: list[int]) -> list[Call]:
    """A table with one step of the given order per interval of the grid; a last interval to 0 takes order 1."""
    sigmas, calls = check_grid(sigmas), []
    for sigma, to, order in zip(sigmas[:-1], sigmas[1:], orders, strict=True):
        calls += [step_call(sigma, euler(sigma, to))] if to == 0 or order == 1 else _STEPS[order](sigma, to)
    return calls


def _second(sigma: float, to: float) -> list[Call]:
    """D_u at the middle of the step in lambda; x_t = e^-h x - expm1(-h) [D_s + (D_u - D_s) / (2 r)], r = 1/2."""
    h = math.log(sigma / to)
    middle = sigma * math.exp(-h / 2)
    return [Call(sigma, euler(sigma, middle)), step_call(middle, Combination(to / sigma, (-math.expm1(-h), 0.0)))]


def _third(sigma: float, to: float) -> list[Call]:
    """D_u and D_v at 1/3 and 2/3 of the step in lambda."""
    h = math.log(sigma / to)
    r1, r2 = 1 / 3, 2 / 3
    u, v = sigma * math.exp(-r1 * h), sigma * math.exp(-r2 * h)
    of_u = r2 / r1 * (math.expm1(-r2 * h) / (r2 * h) + 1)
    of_v = (math.expm1(-h) / h + 1) / r2
    return [
        Call(sigma, euler(sigma, u)),
        Call(u, Combination(v / sigma, (of_u, -math.expm1(-r2 * h) - of_u))),
        step_call(v, Combination(to / sigma, (of_v, 0.0, -math.expm1(-h) - of_v))),
    ]


_STEPS = {2: _second, 3: _third}


def multistep_calls(sigmas: np.ndarray, order: int) -> list[Call]:
    """2M and 3M: past denoised images instead of places in between; the first steps, and one to 0, are of lower order.

    With h_0, h_1 the steps before, r_i = h_i / h and the differences D' = (D_0 - D_1) / r_0, D'' = (D_1 - D_2) / r_1:
    2M adds -expm1(-h) D' / 2 to the first order's step, 3M the exact integrals of a parabola through D_0, D_1, D_2.
    (The authors' code gives the parabola's second difference half this weight, which makes it one of order 2.)
    """
    sigmas, calls = check_grid(sigmas), []
    steps = -np.diff(np.log(np.maximum(sigmas, np.finfo(float).tiny)))  # one to 0 is of order 1, and needs none
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        first, h = euler(sigma, to), steps[i]
        if to == 0 or i == 0 or order == 1:
            calls.append(step_call(sigma, first))
            continue
        phi_1 = -math.expm1(-h)
        r0 = steps[i - 1] / h
        if order == 2 or i == 1:
            slope = phi_1 / 2 / r0
            calls.append(step_call(sigma, Combination(to / sigma, (phi_1 + slope, -slope))))
            continue
        r1 = steps[i - 2] / h
        phi_2 = 1 - phi_1 / h  # the weight of the first derivative in units of h
        phi_3 = phi_2 / h - 0.5
        # First and second differences at D_0, as combinations of D_0, D_1, D_2.
        d0, d1 = np.array([1, -1, 0]) / r0, np.array([0, 1, -1]) / r1
        first_difference = d0 + r0 / (r0 + r1) * (d0 - d1)
        second_difference = (d0 - d1) / (r0 + r1)
        weights = np.array([phi_1, 0, 0]) + phi_2 * first_difference - 2 * phi_3 * second_difference
        calls.append(step_call(sigma, Combination(to / sigma, tuple(weights))))
    return calls
