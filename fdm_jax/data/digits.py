"""scikit-learn's 1,797 handwritten digits (8x8, grey, 10 classes) as a TFDS data set, without TensorFlow.

The files are written once, under the data directory, from the copy that comes with scikit-learn: nothing is
downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fdm_jax.data.builders import prepare
from fdm_jax.data.prepared import PreparedSource, damaged
from fdm_jax.errors import UserError
from fdm_jax.user_dirs import writable_data_root

CLASS_NAMES = tuple(str(digit) for digit in range(10))
TEST_SIZE = 297


class Digits(tfds.core.GeneratorBasedBuilder):
    """Splits ``train`` (1500) and ``test`` (297, stratified); ``image`` uint8 [8, 8, 1], ``label`` 0..9."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "rint(255 / 16 * value); scikit-learn's stratified split with random_state=0."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The test part of UCI's optical recognition of handwritten digits, by scikit-learn.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(names=list(CLASS_NAMES)),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,  # the order on disk is the order of the split, whatever TFDS hashes
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        import sklearn.datasets
        import sklearn.model_selection

        digits = sklearn.datasets.load_digits()
        train, test = sklearn.model_selection.train_test_split(
            np.arange(len(digits.target)), test_size=TEST_SIZE, stratify=digits.target, random_state=0
        )
        images = np.rint(digits.images[..., None] * (255 / 16)).astype(np.uint8)  # pixels are 0..16
        return {
            "train": self._generate_examples(train, images, digits.target),
            "test": self._generate_examples(test, images, digits.target),
        }

    def _generate_examples(
        self, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, row in enumerate(rows):
            yield key, {"image": images[row], "label": int(labels[row])}


def load_digits_arrays(
    split: str = "train", data_dir: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split through the builder, which prepares its files if they are not there.

    Args:
      split: ``train``, ``test``, or both one after the other as ``all`` or ``train+test``.
      data_dir: where the files are; the user's cache directory if not given.

    Returns:
      Images uint8 [N, 8, 8, 1] and labels int32 [N].

    Raises:
      UserError: there is no such split, or the directory cannot be written, or what it holds cannot be read.
    """
    source = PreparedSource(prepare_digits(writable_data_root(data_dir)), split)
    batch = source.read(range(len(source)))
    return batch["image"], batch["label"]


def prepare_digits(data_dir: Path) -> Path:
    """Writes the data set below ``data_dir`` unless it is there, and returns its folder.

    Raises:
      UserError: ``data_dir`` cannot be written, or what it holds cannot be read.
    """
    try:
        return prepare(data_dir, "digits", lambda: _builder(data_dir))
    except OSError as error:
        raise UserError(
            f"digits cannot be prepared in {data_dir} ({error.strerror or error}): give a writable data_dir."
        ) from error


def _builder(data_dir: Path) -> Digits:
    try:
        # This reads dataset_info.json if it is there.
        return Digits(data_dir=str(data_dir), file_format="array_record")
    except Exception as error:
        raise damaged(data_dir / "digits" / str(Digits.VERSION), error) from error
