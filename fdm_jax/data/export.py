"""Writes a data set as a zip in EDM's layout, which the PyTorch original reads."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from fdm_jax.data.archives import LABELS_FILE
from fdm_jax.data.sources import Source
from fdm_jax.errors import UserError
from fdm_jax.whole_files import write_whole


def write_zip(source: Source, path: Path, advance: Callable[[int], None] = lambda done: None) -> None:
    """Writes ``00000/img00000000.png``, ... and ``dataset.json``; the file appears when it is whole.

    Images keep their order and their pixels.  The same set gives the same bytes.

    Args:
      source: what to write.
      path: a new file; its folder is made.
      advance: called with the number of images written so far.

    Raises:
      UserError: the file is there already, or cannot be written.
    """
    if path.suffix != ".zip":
        raise UserError(f"--out must end in .zip, and is {path}.")
    if path.exists():
        raise UserError(f"{path} is there already: delete it, or give another --out.")

    def write(temporary: Path) -> None:
        pairs: list[list[object]] = []
        with zipfile.ZipFile(temporary, "w") as out:  # PNGs are packed already
            for batch in source.in_order():
                for image, label in zip(batch["image"], batch["label"], strict=True):
                    name = f"{len(pairs) // 1000:05d}/img{len(pairs):08d}.png"
                    out.writestr(zipfile.ZipInfo(name), _png(image))
                    pairs.append([name, int(label)])
                advance(len(pairs))
            labels: dict[str, object] = {"labels": pairs if source.spec.num_classes else None}
            if source.spec.class_names:
                labels["class_names"] = list(source.spec.class_names)
            out.writestr(zipfile.ZipInfo(LABELS_FILE), json.dumps(labels))

    write_whole(path, write)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "png")
    return buffer.getvalue()
