"""What a run reports: JSON lines and TensorBoard files."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import register_writer_factory

from fdm_jax import pictures
from fdm_jax.training.metrics import read_metrics
from fdm_jax.whole_files import append_text, filesystem, make_folder, write_text

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_UPLOADS = 120.0


class _EventObject:
    """A TensorBoard file on Google Cloud Storage: kept in memory, and written whole every two minutes and at the end."""

    def __init__(self, path: str):
        self._path, self._content, self._next = path, bytearray(), 0.0

    def write(self, data: bytes) -> None:
        """Append."""
        self._content += data

    def flush(self) -> None:
        """Upload, if it is time."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN_UPLOADS
            self.close()

    def close(self) -> None:
        """Upload."""
        try:
            filesystem().pipe_file(self._path, bytes(self._content))
        except Exception as error:  # the next upload brings all of it; figures are in metrics.jsonl too
            log.warning("%s cannot be written: %s", self._path, error)


class _EventObjects:
    open = staticmethod(_EventObject)


register_writer_factory("gs", _EventObjects())


class Writers:
    """``metrics.jsonl`` and ``tensorboard/`` in a workdir, with images seen as the x axis.

    What is reported is in the files when the call returns, but for TensorBoard's on Google Cloud Storage.  (Not by
    tensorboardX's SummaryWriter: its thread holds figures back for two minutes, and where the disk is full it dies and
    leaves its callers waiting for ever.)

    Args:
      workdir: where to.
      step: optimiser steps done; rows of later steps, written before a crash, are taken back.
      nimg: images seen at that step.
    """

    def __init__(self, workdir: Path, step: int, nimg: int):
        self._path = workdir / "metrics.jsonl"
        self.rows = [row for row in read_metrics(self._path) if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        make_folder(workdir / "tensorboard")
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        self._add(nimg + 1, session_log=SessionLog(status=SessionLog.START))  # takes back, as above

    def _add(self, nimg: int, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=nimg, **what))

    def scalars(self, row: Mapping[str, Any]) -> None:
        """One row with "step", "nimg" and figures.  JSON has no infinity: what is not finite is written as null."""
        row = {key: value if np.isfinite(value) else None for key, value in row.items()}
        self.rows.append(row)
        append_text(self._path, json.dumps(row) + "\n")
        for key, value in row.items():
            if key not in ("step", "nimg") and value is not None:
                self._add(row["nimg"], summary=summary.scalar(key, value))
        self._events.flush()

    def image(self, name: str, image: np.ndarray, nimg: int) -> None:
        """One picture, uint8 [H, W, C]."""
        self._add(nimg, summary=summary.image(name, image, dataformats="HWC"))
        self._events.flush()

    def close(self) -> None:
        """On Google Cloud Storage, the last upload."""
        self._events.close()


def in_words(figures: Mapping[str, float]) -> str:
    """Figures of an evaluation but for those by noise level, for a line of the log."""
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if "@" not in name and name != "seconds")


def write_curves(workdir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Loss and held-out error against images seen, for the eye."""
    for key, file, label in (("loss", "curves.png", "loss"), ("val/error", "held_out.png", "held-out error")):
        points = [(row["nimg"], row[key]) for row in rows if row.get(key) is not None]
        if len(points) > 1:
            nimg, values = zip(*points, strict=True)
            pictures.curves_png(workdir / file, {label: (nimg, values)}, "images seen", label, logy=key == "loss")
