"""Class labels, from ``dataset.json`` or from the folders that the images lie in.

``dataset.json`` is EDM's: ``{"labels": [["00000/img00000000.png", 6], ...]}``; we write, and read, an optional
``"class_names": ["airplane", ...]`` beside it, which other readers ignore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fdm_jax.data.archives import LABELS_FILE, Archive
from fdm_jax.errors import UserError

_WITHOUT = "or go on without labels (--config.data.class_conditional=False, or --labels=none in preparing)."
MAX_CLASSES = 1_000_000
KINDS = ("auto", "json", "folders", "none", "edm")
_NUMBERED = re.compile(r"\d{5}")  # folders that only keep directories small, in EDM's layout and in FFHQ's


class NoLabelsError(UserError):
    """There are none, as opposed to some that are not right."""


class Labels(NamedTuple):
    """A class for every image: ``classes`` int32 [N], and the names of the classes, or () if they have none."""

    classes: np.ndarray
    class_names: tuple[str, ...]


def find_labels(archive: Archive, files: Sequence[str], images: Sequence[str], kind: str = "auto") -> Labels | None:
    """The labels of the images of an archive, or None if there are none.

    Args:
      archive, files, images: as of :func:`read_labels`.
      kind: ``json``: they must be in ``dataset.json``; ``folders``: the top-level folder of an image is its class;
        ``none``: they are not looked for; ``auto``: the first of these three that fits, where a ``dataset.json`` is
        taken at its word (null: no labels), and folders called by five digits (``00000``) are no classes;
        ``edm``: the same without folders.

    Raises:
      UserError: see :func:`read_labels`; or an image lies in no folder.
    """
    if kind == "none":
        return None
    if kind == "json" or (kind != "folders" and LABELS_FILE in files):
        if kind != "json" and _read_json(archive)["labels"] is None:
            return None
        return read_labels(archive, files, images)
    if kind == "edm":
        return None
    folders = [name.split("/")[0] if "/" in name else None for name in images]
    names = sorted({folder for folder in folders if folder is not None})
    if kind == "auto" and (None in folders or len(names) < 2 or all(map(_NUMBERED.fullmatch, names))):
        return None
    if None in folders:
        raise UserError(
            f"{images[folders.index(None)]} in {archive.path} lies in no folder, so its class is not known: "
            "put every image into the folder of its class."
        )
    numbers = {name: i for i, name in enumerate(names)}
    return Labels(np.array([numbers[folder] for folder in folders if folder is not None], np.int32), tuple(names))


def read_labels(archive: Archive, files: Sequence[str], images: Sequence[str]) -> Labels:
    """The labels that ``dataset.json`` gives, in the order of ``images``.

    Args:
      archive: where ``dataset.json`` lies, at the top.
      files: all names in the archive.
      images: the names of the images among them.

    Raises:
      UserError: the file is missing or not of the form above, it lists an image that is not there, an image
        has no label or two, or a label is not a whole number from 0 or is beyond the class names.
    """
    where = f"{LABELS_FILE} in {archive.path}"
    if LABELS_FILE not in files:
        raise NoLabelsError(
            f"{LABELS_FILE}, which holds the labels, is missing from {archive.path}: add it, {_WITHOUT}"
        )
    content = _read_json(archive)
    labels = _labels_by_name(_pairs(content, where), where)
    present = set(images)
    for name in labels:
        if name not in present:
            raise UserError(f"{name}, which {LABELS_FILE} lists, is missing from {archive.path}.")
    unlabelled = [name for name in images if name not in labels]
    if unlabelled:
        raise UserError(
            f"{where} has no label for {unlabelled[0]} (nor for {len(unlabelled) - 1} more of {len(images)} "
            f"images): label every image, {_WITHOUT}"
        )
    classes = np.array([labels[name] for name in images], np.int32)
    names = content.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise UserError(f'"class_names" of {where} should be a list of different names, not {_short(names)}.')
    check_classes(classes, names, [f"{name} in {archive.path}" for name in images] if names else [])
    return Labels(classes, tuple(names))


def check_classes(classes: np.ndarray, class_names: Sequence[str], where: Sequence[str]) -> None:
    """Refuse a label [N] beyond the classes, if these have names; ``where`` [N] names the images in the error.

    Raises:
      UserError: there is one.
    """
    if class_names and int(classes.max()) >= len(class_names):
        i = int(classes.argmax())
        raise UserError(
            f"{where[i]} has the label {classes[i]}, but with {len(class_names)} classes "
            f"labels go from 0 to {len(class_names) - 1}."
        )


def _read_json(archive: Archive) -> dict[str, Any]:
    where = f"{LABELS_FILE} in {archive.path}"
    data = archive.read(LABELS_FILE)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError included
        raise UserError(f"{where} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f'{where} has no "labels": it should read {{"labels": [[file name, class], ...]}}.')
    return content


def _pairs(content: dict[str, Any], where: str) -> list[object]:
    if content["labels"] is None:
        raise NoLabelsError(f'{where} holds "labels": null, so there are no labels: add them, {_WITHOUT}')
    if not isinstance(content["labels"], list):
        raise UserError(f'"labels" of {where} should be a list of [file name, class], not {_short(content["labels"])}.')
    return content["labels"]


def _labels_by_name(pairs: list[object], where: str) -> dict[str, int]:
    labels: dict[str, int] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"{where} holds {_short(pair)} where [file name, class] should be.")
        name, label = pair[0].replace("\\", "/"), pair[1]  # as written on Windows
        if type(label) is not int or not 0 <= label < MAX_CLASSES:  # not isinstance: True is no class
            raise UserError(
                f"{where} gives {name} the label {_short(label)}: a class is a whole number from 0, "
                f"below {MAX_CLASSES:,}."
            )
        if labels.setdefault(name, label) != label:
            raise UserError(f"{where} gives {name} two labels, {labels[name]} and {label}.")
    return labels


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
