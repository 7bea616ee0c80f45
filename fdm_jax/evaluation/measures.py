"""Figures of merit of generated images, each with a deviation."""

from __future__ import annotations

from typing import Any

import numpy as np

from fdm_jax.errors import UserError, nearest
from fdm_jax.evaluation.coverage import precision_recall
from fdm_jax.evaluation.extractors import Extractor
from fdm_jax.evaluation.frechet import frechet_distance
from fdm_jax.evaluation.inception_score import inception_score
from fdm_jax.evaluation.kernel import kernel_distance
from fdm_jax.evaluation.moments import moments
from fdm_jax.evaluation.references import Reference

METRICS = ("frechet", "kernel", "precision-recall", "inception-score")


def choose_metrics(names: list[str] | None, reference: Reference, extractor: Extractor) -> list[str]:
    """The metrics asked for, or all that there is the material for.

    Raises:
      UserError: an unknown metric, or one that the statistics or the extractor do not allow.
    """
    missing = {}
    if reference.features is None:
        without = "the features of real images: make the statistics with `fdm evaluate ref --keep-features`"
        missing = {"kernel": without, "precision-recall": without}
    if extractor.kind != "inception":
        missing["inception-score"] = "the extractor inception"
    for name in names or ():
        if name not in METRICS:
            raise UserError(f"There is no metric {name!r}: {nearest(name, METRICS)}")
        if name in missing:
            raise UserError(f"The metric {name} needs {missing[name]}.")
    return names or [name for name in METRICS if name not in missing]


def measure(
    features: np.ndarray, logits: np.ndarray | None, reference: Reference, extractor: Extractor, metrics: list[str], *,
    bootstrap: int = 10, neighbours: int = 3, coverage_images: int = 10_000, seed: int = 0,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Figures by name: {"value": ..., "deviation": ..., "deviation_of": what that is}.

    Args:
      features: of generated images, [N, D].
      logits: of the Inception score, [N, K].
      reference: of real ones.
      extractor: that made both.
      metrics: from :func:`choose_metrics`.
      bootstrap: how many times the images are drawn anew, with repetition, for the deviation of the Frechet distance.
      neighbours: k of precision and recall.
      coverage_images: precision and recall take at most so many of each set.
      seed: of what is drawn.

    Raises:
      UserError: features that are not finite, or too few of them.
    """
    inception, result = extractor.kind == "inception", {}

    def some(rows: np.ndarray, most: int) -> np.ndarray:
        """In any order: data sets are often sorted by class, and the first ones are then of a few classes."""
        return rows[np.random.default_rng(seed).permutation(len(rows))[:most]]

    def put(name: str, value: float, deviation: float | None, of: str, **more: Any) -> None:
        result[name] = {"value": value, "deviation": deviation, "deviation_of": of} | more

    if "frechet" in metrics:
        value = frechet_distance(*moments(features), reference.mu, reference.sigma)
        rng = np.random.default_rng(seed)
        again = [
            frechet_distance(
                *moments(features[rng.integers(0, len(features), len(features))]), reference.mu, reference.sigma
            )
            for _ in range(bootstrap)
        ]
        deviation = float(np.std(again, ddof=1)) if bootstrap > 1 else None
        put("fid" if inception else "frechet_distance", value, deviation, f"{bootstrap} bootstrap draws of the images")
    if "kernel" in metrics:
        assert reference.features is not None
        value, deviation = kernel_distance(features, reference.features, seed=seed)
        size = min(1000, len(features), len(reference.features))
        put("kid" if inception else "kernel_distance", value, deviation, f"100 subsets of {size} images")
    if "precision-recall" in metrics:
        assert reference.features is not None
        ours, real = some(features, coverage_images), some(reference.features, coverage_images)
        precision, recall = precision_recall(ours, real, neighbours)
        for name, share, n in (("precision", precision, len(ours)), ("recall", recall, len(real))):
            put(name, share, float(np.sqrt(share * (1 - share) / n)), f"a share of {n} images", neighbours=neighbours)
    if "inception-score" in metrics:
        assert logits is not None
        value, deviation = inception_score(some(logits, len(logits)))
        put("inception_score", value, deviation, "10 parts of the images")
    return result
