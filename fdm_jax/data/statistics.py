"""Numbers that describe a data set, among them the sigma_data of EDM's preconditioning."""

from __future__ import annotations

import dataclasses

import numpy as np

from fdm_jax.data.sources import Source


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of all images of a source, pixels being in [-1, 1] as the networks see them (value / 127.5 - 1).

    Attributes:
      class_counts: int64 [K], images per class; empty without classes.
      mean, std: float64 [C], per channel.
      sigma_data: standard deviation of all values of all channels together, about their common mean: EDM's
        sigma_data (arXiv 2206.00364, section 5).
    """

    class_counts: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    sigma_data: float


def measure(source: Source) -> Statistics:
    """Reads every image once; sums are of whole numbers, so the result does not depend on their order.

    Raises:
      UserError: an image cannot be read.
    """
    spec = source.spec
    counts = np.zeros(spec.num_classes, np.int64)
    total, squares = np.zeros(spec.channels, np.int64), np.zeros(spec.channels, np.int64)
    for batch in source.in_order():
        values = batch["image"].astype(np.uint32)
        total += values.sum(axis=(0, 1, 2), dtype=np.int64)
        squares += (values * values).sum(axis=(0, 1, 2), dtype=np.int64)
        if spec.num_classes:
            counts += np.bincount(batch["label"], minlength=spec.num_classes)
    n = len(source) * spec.resolution**2
    mean, variance = _moments(total, squares, n)
    _, (pooled,) = _moments(total.sum(keepdims=True), squares.sum(keepdims=True), n * spec.channels)
    return Statistics(counts, mean / 127.5 - 1, np.sqrt(variance) / 127.5, float(np.sqrt(pooled)) / 127.5)


def _moments(total: np.ndarray, squares: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    mean = total / n
    return mean, np.maximum(squares / n - mean**2, 0)


def examples(source: Source, columns: int, rows: int) -> np.ndarray:
    """Images for a grid of ``columns`` and ``rows``, row by row: a class per column, or spread over an unlabelled set.

    Returns:
      uint8 [rows * columns, H, W, C]; black where a class has fewer than ``rows``.
    """
    spec = source.spec
    if not spec.num_classes:
        return source.read(np.linspace(0, len(source) - 1, rows * columns).astype(np.int64))["image"]
    sheet = np.zeros((rows, columns, spec.resolution, spec.resolution, spec.channels), np.uint8)
    filled = np.zeros(columns, np.int64)
    for batch in source.in_order():
        for image, label in zip(batch["image"], batch["label"], strict=True):
            if label < columns and filled[label] < rows:
                sheet[filled[label], label] = image
                filled[label] += 1
        if (filled == rows).all():
            break
    return sheet.reshape(-1, *sheet.shape[2:])
