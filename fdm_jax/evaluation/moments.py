"""Mean and covariance of features that come in batches."""

from __future__ import annotations

import numpy as np

from fdm_jax.errors import UserError

_BLOCK = 1024  # rows gathered before a matrix product is worth it


class Moments:
    """Count, mean and scatter in float64; the result does not depend on how the features were cut up, beyond rounding.

    Blocks are centred on their own mean and merged (Chan, Golub and LeVeque 1979), so that a large mean costs no digits.
    """

    def __init__(self, width: int):
        self.count = 0
        self._mean = np.zeros(width)
        self._scatter = np.zeros((width, width))
        self._waiting: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Count features [B, D] in.

        Raises:
          UserError: one of them is not finite.
        """
        features = check_finite(np.array(features, np.float64))
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= _BLOCK:
            self._flush()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and unbiased covariance [D, D].

        Raises:
          UserError: fewer than two features.
        """
        self._flush()
        if self.count < 2:
            raise UserError(f"A covariance takes two images or more, and there are {self.count}.")
        return self._mean, self._scatter / (self.count - 1)

    def _flush(self) -> None:
        if self._waiting:
            block, self._waiting = np.concatenate(self._waiting), []
            for start in range(0, len(block), 8 * _BLOCK):
                part = block[start : start + 8 * _BLOCK]
                mean = part.mean(axis=0)
                total, shift = self.count + len(part), mean - self._mean
                part = part - mean
                self._mean = self._mean + shift * (len(part) / total)
                self._scatter += part.T @ part
                self._scatter += np.outer(shift, shift * (self.count * len(part) / total))
                self.count = total


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], in float64."""
    counted = Moments(features.shape[1])
    counted.add(features)
    return counted.result()


def check_finite(features: np.ndarray) -> np.ndarray:
    """The features [N, D].

    Raises:
      UserError: some are NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise UserError(
            f"The features of {len(bad):,} of {len(features):,} images are not finite, image {bad[0]} first: the images or "
            "the extractor's weights are damaged."
        )
    return features
