"""What a run reports: JSON lines, TensorBoard files, and a progress bar or plain lines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line that a crash cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows


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
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if key not in ("step", "nimg") and value is not None:
                self._tensorboard.add_scalar(key, value, row["nimg"])

    def image(self, name: str, image: np.ndarray, nimg: int) -> None:
        """One picture, uint8 [H, W, C]."""
        self._tensorboard.add_image(name, image, nimg, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._tensorboard.close()


class Progress:
    """A bar on a terminal; plain lines, one per call of ``report``, elsewhere.

    Args:
      total: images of the whole run.
      done: images seen before this start.
      quiet: show nothing (processes other than the first).
    """

    def __init__(self, total: int, done: int, quiet: bool = False):
        self._total, self._done, self._start = total, done, done
        self._began, self._quiet = time.monotonic(), quiet
        self._bar = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=total, initial=done, unit="img", unit_scale=True, dynamic_ncols=True, smoothing=0.05)

    def advance(self, done: int) -> None:
        """``done`` images are seen."""
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done

    def report(self, loss: float, img_per_s: float) -> None:
        """Say how it goes."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4g}")
        elif not self._quiet:
            left = (self._total - self._done) / max(img_per_s, 1e-9)
            self.say(
                f"{self._done:>11,} of {self._total:,} images ({self._done / self._total:4.0%})  loss {loss:<8.4g}"
                f"  {img_per_s:,.0f} img/s  {duration(left)} left"
            )

    def say(self, text: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
