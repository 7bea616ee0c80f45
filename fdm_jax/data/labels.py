"""Class labels from ``dataset.json``, which reads ``{"labels": [["00000/img00000000.png", 6], ...]}``."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from fdm_jax.data.archives import LABELS_FILE, Archive
from fdm_jax.errors import UserError

_WITHOUT = "or go on without labels (use_labels=False)."


def read_labels(archive: Archive, files: Sequence[str], images: Sequence[str]) -> np.ndarray:
    """The label of every image, int32 [N], in the order of ``images``.

    Args:
      archive: where ``dataset.json`` lies, at the top.
      files: all names in the archive.
      images: the names of the images among them.

    Raises:
      UserError: the file is missing or not of the form above, it lists an image that is not there, an image
        has no label or two, or a label is not a whole number from 0.
    """
    where = f"{LABELS_FILE} in {archive.path}"
    if LABELS_FILE not in files:
        raise UserError(f"{LABELS_FILE}, which holds the labels, is missing from {archive.path}: add it, {_WITHOUT}")
    labels = _labels_by_name(_parse(archive.read(LABELS_FILE), where), where)
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
    return np.array([labels[name] for name in images], np.int32)


def _parse(data: bytes, where: str) -> list[object]:
    try:
        content = json.loads(data)
    except ValueError as error:  # UnicodeDecodeError included
        raise UserError(f"{where} is not valid JSON ({error}).") from error
    if not isinstance(content, dict) or "labels" not in content:
        raise UserError(f'{where} has no "labels": it should read {{"labels": [[file name, class], ...]}}.')
    if content["labels"] is None:
        raise UserError(f'{where} holds "labels": null, so there are no labels: add them, {_WITHOUT}')
    if not isinstance(content["labels"], list):
        raise UserError(f'"labels" of {where} should be a list of [file name, class], not {_short(content["labels"])}.')
    return content["labels"]


def _labels_by_name(pairs: list[object], where: str) -> dict[str, int]:
    labels: dict[str, int] = {}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"{where} holds {_short(pair)} where [file name, class] should be.")
        name, label = pair[0].replace("\\", "/"), pair[1]  # as written on Windows
        if type(label) is not int or not 0 <= label < 2**31:  # not isinstance: True is no class
            raise UserError(f"{where} gives {name} the label {_short(label)}: a class is a whole number from 0.")
        if labels.setdefault(name, label) != label:
            raise UserError(f"{where} gives {name} two labels, {labels[name]} and {label}.")
    return labels


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
