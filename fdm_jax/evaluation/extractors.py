"""From images to features: Inception, DINOv2, a classifier of one's own, or the pixels themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.devices import checked, fetch, in_batches, put, replicated, sent_ahead, sharded
from fdm_jax.errors import UserError, nearest
from fdm_jax.evaluation.weights import sha256

KINDS = ("inception", "classifier", "dinov2", "pixels")
MAX_PIXELS = 3072  # values of an image whose pixels are features; their covariance has the square of it


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A way to features.

    Attributes:
      kind: of :data:`KINDS`.
      width: D.
      checksum: SHA-256 of the weights' file; None for pixels.
      variables: the weights.
      apply: (variables, images uint8 [B, H, W, C]) -> features float32 [B, D] and logits [B, K] or None; pure.
    """

    kind: str
    width: int
    checksum: str | None
    variables: Any
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]]

    def describe(self) -> dict[str, Any]:
        """What a result has to say of it."""
        return {"extractor": self.kind, "width": self.width, "weights_sha256": self.checksum}


def open_extractor(kind: str, weights: Path | None, image_shape: tuple[int, int, int]) -> Extractor:
    """An extractor by name.

    Args:
      kind: of :data:`KINDS`.
      weights: its file; for pixels None.
      image_shape: (H, W, C) of the images it will get.

    Raises:
      UserError: an unknown kind, weights that are missing, superfluous or something else, or images that it cannot take.
    """
    if kind not in KINDS:
        raise UserError(f"There is no extractor {kind!r}: {nearest(kind, KINDS)}")
    if (weights is None) != (kind == "pixels"):
        raise UserError(
            f"The extractor {kind} needs its weights: give their file with --weights."
            if weights is None
            else "The extractor pixels has no weights: leave --weights out."
        )
    if weights is None:
        return _pixels(image_shape)
    if not weights.is_file():
        raise UserError(f"The weights {weights} are not there.")
    checksum = sha256(weights)
    if kind == "inception":
        from fdm_jax.evaluation.inception import inception_features, load_inception

        return Extractor(kind, 2048, checksum, load_inception(weights), inception_features)
    if kind == "dinov2":
        from fdm_jax.evaluation.dinov2 import dinov2_features, load_dinov2

        config, variables = load_dinov2(weights)
        width = jax.eval_shape(
            lambda v, x: dinov2_features(config, v, x), variables, jax.ShapeDtypeStruct((1, *image_shape), jnp.uint8)
        ).shape[1]
        return Extractor(kind, width, checksum, variables, lambda v, x: (dinov2_features(config, v, x), None))
    from fdm_jax.evaluation import classifier

    fitted = classifier.load(weights)
    if fitted.image_shape != image_shape:
        raise UserError(
            f"The classifier {weights} reads images of {'x'.join(map(str, fitted.image_shape))}, and these are "
            f"{'x'.join(map(str, image_shape))}."
        )
    return Extractor(kind, classifier.WIDTH, checksum, fitted.params, fitted.apply)


def _pixels(image_shape: tuple[int, int, int]) -> Extractor:
    width = int(np.prod(image_shape))
    if width > MAX_PIXELS:
        raise UserError(
            f"The extractor pixels takes images of up to {MAX_PIXELS:,} values, and these have {width:,}: use another one."
        )
    return Extractor(
        "pixels", width, None, {}, lambda _, images: (images.reshape(len(images), -1).astype(jnp.float32) / 255, None)
    )


class FeatureMaker:
    """Runs an extractor on all devices in batches of one size, so that it is compiled once.

    Args:
      extractor: which.
      mesh: one axis, over which the rows of a batch are dealt.
      batch_size: rounded up to a multiple of the devices.
      check: of the program, see :func:`~fdm_jax.devices.checked`.
    """

    def __init__(
        self,
        extractor: Extractor,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        check: Callable[[jax.stages.Compiled], None] | None = None,
    ):
        rows, whole = sharded(mesh), replicated(mesh)
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._mesh, self._rows = mesh, rows
        self._variables = put(extractor.variables, whole)
        self._apply = checked(jax.jit(extractor.apply, in_shardings=(whole, rows), out_shardings=rows), check)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 [N, H, W, C] -> features float32 [N, D], and logits [N, K] if the extractor has them."""
        features, logits = [], []
        sent = (
            (rows, self._apply(self._variables, put(part, self._rows)))
            for rows, (part,) in in_batches(self.batch_size, images)
        )
        for rows, (of_part, logits_of_part) in sent_ahead(sent, self._mesh):
            features.append(fetch(of_part).astype(np.float32)[:rows])
            if logits_of_part is not None:
                logits.append(fetch(logits_of_part).astype(np.float32)[:rows])
        return np.concatenate(features), np.concatenate(logits) if logits else None
