"""scikit-learn's 1,797 handwritten digits (8x8, grey, 10 classes) as a TFDS data set, without TensorFlow.

The files are written once, under the data directory, from the copy that comes with scikit-learn: nothing is
downloaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from fdm_jax.errors import UserError
from fdm_jax.user_dirs import user_cache_dir

CLASS_NAMES = tuple(str(digit) for digit in range(10))
SIZES = {"train": 1500, "test": 297}
SPLITS = {"train": ("train",), "test": ("test",), "train+test": ("train", "test"), "all": ("train", "test")}


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
            np.arange(len(digits.target)), test_size=SIZES["test"], stratify=digits.target, random_state=0
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


def default_data_dir() -> Path:
    """``$XDG_CACHE_HOME/fdm_jax/data``, or ``~/.cache/fdm_jax/data``."""
    return user_cache_dir() / "data"


def load_digits_arrays(
    split: str = "train", data_dir: str | os.PathLike[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split through the builder, which prepares its files if they are not there.

    Args:
      split: ``train``, ``test``, or both one after the other as ``all`` or ``train+test``.
      data_dir: where the files are; :func:`default_data_dir` if not given.

    Returns:
      Images uint8 [N, 8, 8, 1] and labels int32 [N].

    Raises:
      UserError: there is no such split, or the directory cannot be written, or what it holds cannot be read.
    """
    if split not in SPLITS:
        raise UserError(f"digits has no split {split!r}: choose one of {', '.join(SPLITS)}.")
    root = Path(data_dir).expanduser() if data_dir else default_data_dir()
    try:
        builder = prepare(root)
    except OSError as error:
        raise UserError(
            f"digits cannot be prepared in {root} ({error.strerror or error}): give a writable data_dir."
        ) from error
    examples: list[Any] = []
    for part in SPLITS[split]:
        try:
            examples += builder.as_data_source(split=part).__getitems__(list(range(SIZES[part])))
        except Exception as error:  # whatever TFDS and array_record make of missing or damaged files
            raise _damaged(builder.data_dir) from error
    images = np.stack([example["image"] for example in examples])
    return images, np.array([example["label"] for example in examples], np.int32)


def prepare(data_dir: Path) -> Digits:
    """Writes the data set below ``data_dir`` unless it is there, and returns its builder.

    TFDS writes into a temporary folder and renames it, so the final folder is whole or absent. A lock makes
    all but one of several processes wait, and lets that one sweep up after another that was killed.

    Raises:
      OSError: ``data_dir`` cannot be written.
    """
    builder = _builder(data_dir)
    if not Path(builder.data_dir).exists():
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir / "digits.lock") as locked:
            if locked:
                for remains in (data_dir / "digits").glob("incomplete.*"):
                    shutil.rmtree(remains, ignore_errors=True)
            try:
                # TFDS announces itself on stdout and draws bars on stderr.
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    _builder(data_dir).download_and_prepare()
            except OSError:
                # Without a lock another process may have renamed its folder first, which does as well.
                if not Path(builder.data_dir).exists():
                    raise
        builder = _builder(data_dir)  # one that finds the files, whoever wrote them
    return builder


def _builder(data_dir: Path) -> Digits:
    try:
        # This reads dataset_info.json if it is there.
        return Digits(data_dir=str(data_dir), file_format="array_record")
    except Exception as error:
        raise _damaged(data_dir / "digits" / str(Digits.VERSION)) from error


def _damaged(folder: str | os.PathLike[str]) -> UserError:
    return UserError(f"the prepared digits in {folder} are damaged: delete that folder, it will be made anew.")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock on a file; yields False where the file system has no locks."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True  # closing the file unlocks it, and so does the death of the process
