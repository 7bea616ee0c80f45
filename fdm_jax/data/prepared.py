"""Reads data sets that were prepared as TFDS array_record files, from their folder alone."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.data.sources import DataSpec, Source
from fdm_jax.errors import UserError
from fdm_jax.storage_errors import system_fails
from fdm_jax.whole_files import check_utf8

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_INFO, _FEATURES = "dataset_info.json", "features.json"


def is_prepared(folder: Path) -> bool:
    """Whether a folder is that of a prepared data set (of one version, as in ``cifar10/1.0.0``)."""
    return (folder / _INFO).is_file() and (folder / _FEATURES).is_file()


def find_prepared(name: str, data_dir: Path) -> Path | None:
    """The folder of the newest version of ``name`` or ``name/config`` below ``data_dir``; None if it is not there.

    Raises:
      UserError: there are configurations of that name, so that one must be chosen.
    """
    folder = data_dir / name
    if is_prepared(folder):
        return folder
    subfolders = _subfolders(folder)
    versions = [path for path in subfolders if _VERSION.fullmatch(path.name) and is_prepared(path)]
    if versions:
        return max(versions, key=lambda path: [int(n) for n in path.name.split(".")])
    # Also sets that were moved there, which have any name.
    configs = sorted(path.name for path in subfolders if is_prepared(path) or any(map(is_prepared, _subfolders(path))))
    if configs:
        raise UserError(f"{name} is prepared as {', '.join(configs)}: name one, as in {name}/{configs[0]}.")
    return None


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


class PreparedSource(Source):
    """One split of a prepared data set; ``metadata`` is what its folder says of its origin.

    Args:
      folder: see :func:`is_prepared`.
      split: in TFDS's words: ``train``, ``test``, ``train+test`` (or ``all``), ``train[:1000]``, ``train[90%:]``.
      use_labels: whether labels are read; without, all are 0 and ``spec.num_classes`` is 0.

    Raises:
      UserError: there is no such split, files are missing or damaged, the folder's name is not UTF-8, the files are
        TFRecords, or the examples are not an ``image`` of bytes of one square size with at most one ``label``, a class.
    """

    def __init__(self, folder: Path, split: str = "train", *, use_labels: bool = True):
        check_utf8(folder)
        self._folder, self._split = folder, split
        info = self._builder.info
        if info.file_format is not None and info.file_format.value != "array_record":
            raise UserError(
                f"{folder} holds {info.file_format.value} files, which only TensorFlow reads: prepare the data set with "
                '`fdm dataset prepare`, or by TFDS with file_format="array_record".'
            )
        try:
            self.metadata: dict[str, Any] = dict(info.metadata or {})
        except (OSError, ValueError, TypeError) as error:
            raise damaged(folder, error) from error
        features = dict(info.features or {})
        image, label = features.get("image"), features.get("label") if use_labels else None
        shape = None if image is None else image.shape
        if not (image and shape and len(shape) == 3 and shape[0] == shape[1] and shape[0] and shape[2] in (1, 3)):
            raise UserError(
                f"{folder} has no image feature of one square size with 1 or 3 channels (it is {shape}): "
                "prepare it with `fdm dataset prepare`."
            )
        pixels = np.dtype(image.np_dtype)
        if pixels != np.uint8 or (label is not None and not getattr(label, "num_classes", None)):
            raise UserError(
                f"{folder} has images of {pixels}, or labels that are no classes, and not bytes and TFDS's ClassLabel: "
                "prepare it with `fdm dataset prepare`."
            )
        try:
            count = len(self._records)
        except UserError:
            raise
        except Exception as error:  # TFDS raises KeyError, ValueError and AssertionError of its own
            if split not in info.splits and not any(c in split for c in "+["):
                known = ", ".join([*info.splits, "all"])
                raise UserError(f"{info.name} has no split {split!r}: choose one of {known}.") from error
            said = " ".join(str(error).split())  # TFDS says it in lines
            raise UserError(f"the split {split!r} of {info.name} cannot be had ({said}).") from error
        names = tuple(label.names) if label is not None else ()
        if label is not None and len(names) != label.num_classes:  # TFDS does not compare them
            raise damaged(folder, ValueError(f"it has {len(names)} names for {label.num_classes} classes"))
        self.spec = DataSpec(
            name=info.full_name.removesuffix(f"/{info.version}"),
            num_images=count,
            resolution=shape[0],
            channels=shape[2],
            num_classes=len(names),
            class_names=names or None,
        )

    @property
    def splits(self) -> str:
        """50,000 train, 10,000 test"""
        return ", ".join(f"{split.num_examples:,} {name}" for name, split in self._builder.info.splits.items())

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_split": self._split, "metadata": self.metadata, "spec": self.spec}

    @functools.cached_property
    def _builder(self) -> Any:
        # Here, because importing TFDS takes a second which those who give a zip need not wait.
        import tensorflow_datasets as tfds

        try:
            return tfds.builder_from_directory(os.fspath(self._folder))
        except Exception as error:  # whatever TFDS makes of missing or damaged files
            raise damaged(self._folder, error) from error

    @functools.cached_property
    def _records(self) -> Any:
        info = self._builder.info
        split = "+".join(info.splits) if self._split == "all" else self._split
        return self._builder.as_data_source(split=split)

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        spec = self.spec
        images = np.empty((len(indices), spec.resolution, spec.resolution, spec.channels), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        try:
            examples = self._records.__getitems__([int(i) for i in indices])
            for row, example in enumerate(examples):
                images[row] = example["image"]
                labels[row] = example.get("label", 0) if spec.num_classes else 0
        except Exception as error:  # whatever TFDS and array_record make of missing or damaged files
            raise damaged(self._folder, error) from error
        wrong = (labels < 0) | (labels >= max(spec.num_classes, 1))
        if wrong.any():  # TFDS lets -1 through, which says that a class is not known
            i = int(np.argmax(wrong))
            raise UserError(
                f"example {indices[i]} of {spec.name} has the label {labels[i]}, but with {spec.num_classes} classes "
                f"labels go from 0 to {spec.num_classes - 1}: train without them (--config.data.class_conditional=False)."
            )
        return {"image": images, "label": labels}


def damaged(folder: Path, error: Exception) -> UserError:
    """What to say of a folder whose files cannot be read."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    remedy = "" if system_fails(error) else ": if it is damaged, delete that folder and prepare it again"
    return UserError(f"the prepared data set in {folder} cannot be read ({reason}){remedy}.")
