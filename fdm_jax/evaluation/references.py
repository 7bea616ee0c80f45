"""Statistics of real images to measure against: ``.npz`` with ``mu`` and ``sigma``, as EDM's authors publish them.

Ours also have ``description`` (JSON: extractor, checksum of its weights, data, number of images) and on request
``features``, which kernel distance, precision and recall need.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.data.staging import local_copy
from fdm_jax.errors import UserError
from fdm_jax.evaluation.extractors import Extractor, open_extractor
from fdm_jax.evaluation.weights import sha256
from fdm_jax.storage_errors import system_fails
from fdm_jax.whole_files import save_npz


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of a set of real images.

    Attributes:
      mu, sigma: mean [D] and covariance [D, D] of the features, float64.
      features: [N, D], or None if they were not kept.
      description: what is known of their making; empty for files of others.
      checksum: SHA-256 of the file.
    """

    mu: np.ndarray
    sigma: np.ndarray
    features: np.ndarray | None = None
    description: dict[str, Any] = dataclasses.field(default_factory=dict)
    checksum: str | None = None


def save_reference(reference: Reference, path: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    arrays = {"mu": reference.mu, "sigma": reference.sigma, "description": np.array(json.dumps(reference.description))}
    if reference.features is not None:
        arrays["features"] = reference.features
    save_npz(path, arrays)


def load_reference(path: Path) -> Reference:
    """Read a file of ours or of EDM's format.

    Raises:
      UserError: it is missing, has no mean or covariance, or they and the features do not fit each other or are not finite.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except OSError as error:
        raise UserError(f"The statistics {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # zlib, zipfile, NumPy: a damaged file makes them raise nearly anything
        if system_fails(error):
            raise
        raise UserError(
            f"{path} is no file of statistics: `fdm evaluate ref` writes one (.npz with mu and sigma)."
        ) from error
    for name, ndim in (("mu", 1), ("sigma", 2)):
        if name not in arrays:
            raise UserError(f"The statistics {path} have no {name}: mean (mu) and covariance (sigma) must be there.")
        if arrays[name].ndim != ndim or arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise UserError(f"The {name} of {path} must be finite numbers in {ndim} dimension(s).")
    mu, sigma = arrays["mu"].astype(np.float64), arrays["sigma"].astype(np.float64)
    if sigma.shape != (len(mu), len(mu)):
        raise UserError(f"The covariance of {path} is {list(sigma.shape)}, and its mean has {len(mu)} numbers.")
    try:
        description = dict(json.loads(str(arrays.get("description", "{}"))))
    except (ValueError, TypeError) as error:
        raise UserError(f"The description in {path} is damaged.") from error
    features = arrays.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mu) or features.dtype.kind != "f"):
        raise UserError(
            f"The features of {path} must be numbers [N, {len(mu)}], as many as the mean has, and are {features.dtype} "
            f"{list(features.shape)}."
        )
    return Reference(mu, sigma, features, description, sha256(path))


def open_with_extractor(
    path: Path, kind: str | None, weights: Path | None, image_shape: tuple[int, int, int]
) -> tuple[Reference, Extractor]:
    """Statistics, and the extractor that goes with them; files may be on gs://.

    Args:
      path: of the statistics.
      kind, weights, image_shape: see :func:`~fdm_jax.evaluation.extractors.open_extractor`; without a kind the one that
        the statistics were made with, else inception.

    Raises:
      UserError: one of them is not what it should be, or they do not fit each other.
    """
    reference, weights = load_reference(local_copy(path)), weights and local_copy(weights)
    extractor = open_extractor(kind or reference.description.get("extractor", "inception"), weights, image_shape)
    check_fits(reference, extractor, path)
    return reference, extractor


def check_fits(reference: Reference, extractor: Extractor, path: Path | str) -> None:
    """Raise a UserError unless the statistics are of this extractor's features, as far as can be told."""
    if len(reference.mu) != extractor.width:
        raise UserError(
            f"The statistics {path} are of {len(reference.mu)} numbers an image, and the extractor {extractor.kind} "
            f"gives {extractor.width}."
        )
    known = reference.description
    for field, ours in extractor.describe().items():
        if known.get(field, ours) != ours:
            raise UserError(f"The statistics {path} were made with the {field} {known[field]}, and this is {ours}.")
