"""The Frechet distance between two Gaussians fitted to features."""

from __future__ import annotations

import numpy as np
import scipy.linalg


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64 (Heusel et al. 2017, equation 6).

    With S = L L^T, tr (S1 S2)^(1/2) is the sum of the singular values of L1^T L2: no root of a matrix that is not
    symmetric is taken, and singular covariances need no special care.
    """
    mu1, mu2 = np.asarray(mu1, np.float64), np.asarray(mu2, np.float64)
    trace_of_root = np.sum(scipy.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)))
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_of_root)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """L with L L^T = sigma, for a covariance that may be singular."""
    values, vectors = scipy.linalg.eigh(np.asarray(sigma, np.float64))
    return vectors * np.sqrt(np.maximum(values, 0))
