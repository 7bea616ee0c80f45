"""What a run reports: JSON lines and TensorBoard files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.record_writer import register_writer_factory

from fdm_jax.training.metrics import read_metrics
from fdm_jax.whole_files import append_text, filesystem, write_text

log = logging.getLogger(__name__)


class _EventObject:
    """A TensorBoard file on Google Cloud Storage: kept in memory, and written whole at each flush, every two minutes.

    In place of tensorboardX's own, which writes once more whenever it is garbage-collected, and waits minutes for that.
    """

    def __init__(self, path: str):
        self._path, self._content, self._written = path, bytearray(), 0

    def write(self, data: bytes) -> None:
        """Append."""
        self._content += data

    def flush(self) -> None:
        """Upload; called by tensorboardX's thread."""
        size = len(self._content)
        if size > self._written:
            try:
                filesystem().pipe_file(self._path, bytes(self._content))
                self._written = size
            except Exception as error:  # the next flush brings all of it; figures are in metrics.jsonl too
                log.warning("%s cannot be written: %s", self._path, error)

    def close(self) -> None:
        """All is flushed by then."""


class _EventObjects:
    open = staticmethod(_EventObject)

    def directory_check(self, path: str) -> None:
        """There are no folders."""


register_writer_factory("gs", _EventObjects())


class Writers:
    """``metrics.jsonl`` and ``tensorboard/`` in a workdir, with images seen as the x axis.

    Args:
      workdir: where to.
      step: optimiser steps done; rows of later steps, written before a crash, are taken back.
      nimg: images seen at that step.
    """

    def __init__(self, workdir: Path, step: int, nimg: int):
        self._path = workdir / "metrics.jsonl"
        self.rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=nimg + 1 if step else None)

    def scalars(self, row: Mapping[str, Any]) -> None:
        """One row with "step", "nimg" and figures.  JSON has no infinity: what is not finite is written as null."""
        row = {key: value if np.isfinite(value) else None for key, value in row.items()}
        self.rows.append(row)
        append_text(self._path, json.dumps(row) + "\n")
        for key, value in row.items():
            if key not in ("step", "nimg") and value is not None:
                self._tensorboard.add_scalar(key, value, row["nimg"])

    def image(self, name: str, image: np.ndarray, nimg: int) -> None:
        """One picture, uint8 [H, W, C]."""
        self._tensorboard.add_image(name, image, nimg, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._tensorboard.close()
