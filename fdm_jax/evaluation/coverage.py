"""Precision and recall of generated images by nearest neighbours (Kynkaanniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

import numpy as np

from fdm_jax.errors import UserError

_BLOCK = 2048


def precision_recall(generated: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    """How much of what is generated is real, and how much of what is real is generated.

    A set covers a point that lies no farther from one of its features than that one's k-th neighbour in the set.

    Args:
      generated, real: features [N, D], [M, D].
      k: neighbours.

    Returns:
      Precision: the share of generated features that the real ones cover; recall: the other way about.

    Raises:
      UserError: k or fewer features in a set, or different widths.
    """
    if min(len(generated), len(real)) <= k or generated.shape[1] != real.shape[1]:
        raise UserError(
            f"Precision and recall take two sets of more than {k} features of one width, not {generated.shape} and {real.shape}."
        )
    generated, real = (np.asarray(x, np.float64) for x in (generated, real))
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    # A point is its own nearest neighbour, at a distance of 0; the k-th other comes after it.
    radii = np.concatenate([np.partition(d, k, axis=1)[:, k] for d in _squared_distances(centres, centres)])
    return float(np.mean(np.concatenate([(d <= radii).any(axis=1) for d in _squared_distances(points, centres)])))


def _squared_distances(a: np.ndarray, b: np.ndarray):  # type: ignore[no-untyped-def]
    """Blocks of rows of the matrix [N, M]."""
    of_b = np.sum(b**2, axis=1)
    for start in range(0, len(a), _BLOCK):
        block = a[start : start + _BLOCK]
        yield np.maximum(np.sum(block**2, axis=1)[:, None] + of_b - 2 * block @ b.T, 0)
