"""UniPC and DEIS: solvers that use past evaluations."""

from __future__ import annotations

import math

import numpy as np

from fdm_jax.sampling.linear import Call, Combination, check_grid, euler, step_call


def unipc_calls(sigmas: np.ndarray, order: int) -> list[Call]:
    """UniPC (Zhao et al., arXiv 2302.04867) of order p, data prediction, B(h) = e^h - 1 ("bh2").

    Each call serves twice: it corrects the step that led to it (UniC-p, one order higher, at no further cost), and
    predicts the next (UniP-p).  The first steps and a last one to 0 are of lower order.
    """
    sigmas = check_grid(sigmas)
    lam = -np.log(np.maximum(sigmas, np.finfo(float).tiny))
    calls = []
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        # At call i the memory is D_i, D_{i-1}, ...; the anchor is x_{i-1}, corrected.
        anchor = Combination(1.0) if i == 0 else _unified(lam, i - 1, i, min(order, i), corrects=True)
        if to == 0:
            onwards = euler(sigma, 0.0)
        else:
            onwards = _unified(lam, i, i + 1, min(order, i + 1), corrects=False)
        calls.append(Call(sigma, onwards.after(anchor), anchor))
    return calls


def _unified(lam: np.ndarray, start: int, end: int, order: int, corrects: bool) -> Combination:
    """x at ``end`` from x at ``start`` and denoised images: newest first, with that at ``end`` if it corrects."""
    h = lam[end] - lam[start]
    minus_phi_1 = math.expm1(-h)
    # Places of the images other than the one at start, in units of the step; the newest of all is at 1 if it corrects.
    r = [(lam[start - j] - lam[start]) / h for j in range(1, order)] + ([1.0] if corrects else [])
    rho: np.ndarray = np.zeros(0)
    if r:
        phi, factorial, b = minus_phi_1 / -h - 1, 1, []
        for k in range(1, len(r) + 1):
            b.append(phi * factorial / minus_phi_1)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve(np.vander(r, increasing=True).T, b)
        if len(r) == 1:
            rho = np.array([0.5])  # the authors' choice, exact to the same order
    of_start, others = -minus_phi_1, []
    for weight, place in zip(rho, r, strict=True):
        others.append(-minus_phi_1 * weight / place)
        of_start -= others[-1]
    of_newest = [others.pop()] if corrects else []
    return Combination(math.exp(-h), (*of_newest, of_start, *others))


def deis_calls(sigmas: np.ndarray, order: int) -> list[Call]:
    """DEIS (Zhang and Chen, arXiv 2204.13902), tAB-(order - 1) in sigma: slopes (x - D) / sigma through past calls.

    The step adds the integral over sigma of the polynomial through the last ``order`` slopes.  The first steps and one
    to 0 are of lower order.
    """
    sigmas, calls = check_grid(sigmas), []
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        known = sigmas[max(0, i - order + 1) : i + 1][::-1] if to > 0 else sigmas[i : i + 1]
        x = Combination(1.0, tuple(_integrals(known, sigma, to)))
        calls.append(step_call(sigma, x)._replace(remember=(1 / sigma, -1 / sigma)))
    return calls


# Adams and Bashforth's weights of the last 1, 2, 3 and 4 slopes, newest first.
_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm_calls(sigmas: np.ndarray) -> list[Call]:
    """iPNDM (Zhang and Chen, arXiv 2204.13902, after Liu et al., arXiv 2202.09778): up to four slopes (x - D) / sigma.

    The weights are those of even steps, whatever the grid: of order 4 where steps are even, of order 2 where they change
    smoothly.
    """
    sigmas, calls = check_grid(sigmas), []
    for i, (sigma, to) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        weights = _ADAMS_BASHFORTH[min(i, 3) if to > 0 else 0]
        x = Combination(1.0, tuple((to - sigma) * weight for weight in weights))
        calls.append(step_call(sigma, x)._replace(remember=(1 / sigma, -1 / sigma)))
    return calls


def _integrals(nodes: np.ndarray, start: float, end: float) -> list[float]:
    """The integral from start to end of each Lagrange polynomial of the nodes."""
    points, weights = np.polynomial.legendre.leggauss(len(nodes))  # exact for these degrees
    s = start + (end - start) * (points + 1) / 2
    integrals = []
    for j, node in enumerate(nodes):
        others = np.delete(nodes, j)
        values = np.prod([(s - other) / (node - other) for other in others], axis=0) if len(others) else np.ones_like(s)
        integrals.append(float((end - start) / 2 * (weights * values).sum()))
    return integrals
