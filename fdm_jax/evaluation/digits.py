"""Are generated digits readable?  A support vector machine trained on real ones reads them."""

from __future__ import annotations

import os

import numpy as np
from sklearn.svm import SVC

from fdm_jax.data.digits import load_digits_arrays
from fdm_jax.evaluation.frechet import frechet_distance
from fdm_jax.evaluation.moments import moments


class DigitJudge:
    """A classifier fitted on the 1,500 training digits, and the moments of all 1,797.

    Attributes:
      held_out_accuracy: share of the 297 held-out real digits that it reads right, about 0.993.
    """

    def __init__(self, data_dir: str | os.PathLike[str] | None = None):
        images, labels = load_digits_arrays("train", data_dir)
        self._classifier = SVC(C=10, gamma="scale").fit(_features(images), labels)
        held_out = load_digits_arrays("test", data_dir)
        self.held_out_accuracy = self.accuracy(*held_out)
        self._moments = moments(_features(np.concatenate([images, held_out[0]])))

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images (uint8 [N, 8, 8, 1]) that are read as their labels [N]."""
        return float(np.mean(self._classifier.predict(_features(images)) == labels))

    def frechet(self, images: np.ndarray) -> float:
        """Frechet distance, on pixels in [0, 1], between images (uint8 [N, 8, 8, 1]) and all real digits."""
        return frechet_distance(*moments(_features(images)), *self._moments)


def _features(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0
