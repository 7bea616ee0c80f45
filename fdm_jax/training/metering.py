"""What the steps say of themselves, fetched behind the devices, and how fast they are."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fdm_jax.training.step import Metrics


class Meter:
    """Collects the metrics of programs that were sent to the devices, and makes rows of them.

    Args:
      batch_size: images per step.
      get_metrics: what a program gives -> scalars, or [steps].
      check: called with the metrics of every step, in order.
    """

    def __init__(
        self, batch_size: int, get_metrics: Callable[[Any], Metrics], check: Callable[[dict[str, float]], None]
    ):
        self._batch_size, self._get_metrics, self._check = batch_size, get_metrics, check
        self._under_way: collections.deque[Any] = collections.deque()
        self._steps: list[dict[str, float]] = []  # since the last row
        self._untimed = 0  # of these
        self._tick = time.monotonic()

    @property
    def unreported(self) -> bool:
        """Whether there are steps that no row tells of."""
        return bool(self._steps or self._under_way)

    def sent(self, metrics: Any) -> None:
        """A program is under way, and will give these."""
        self._under_way.append(metrics)

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many programs are under way."""
        while len(self._under_way) > most:
            fetched = jax.device_get(self._get_metrics(self._under_way.popleft()))
            columns = {key: np.atleast_1d(value).tolist() for key, value in fetched.items()}
            for values in zip(*columns.values(), strict=True):
                self._steps.append(dict(zip(columns, map(float, values), strict=True)))
                self._check(self._steps[-1])

    def compiled(self) -> None:
        """The first program was sent: its compilation says nothing of the speed."""
        self.wait()
        self._untimed, self._tick = len(self._steps), time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is not training, and takes nothing from its speed."""
        self.wait()
        began = time.monotonic()
        yield
        self._tick += time.monotonic() - began

    def row(self) -> dict[str, float]:
        """Of the steps since the last row: means; counts as sums; what a schedule sets, as it is now; img_per_s, if known."""
        self.wait()
        now, row = time.monotonic(), dict[str, float]()
        for key, latest in self._steps[-1].items():
            values = [step[key] for step in self._steps]
            if key in ("loss", "grad_norm"):
                row[key] = float(np.mean(values))
            elif key == "bad_gradients":
                row[key] = float(np.sum(values))
            else:
                row[key] = latest
        if timed := len(self._steps) - self._untimed:
            row["img_per_s"] = timed * self._batch_size / max(now - self._tick, 1e-9)
        self._steps, self._untimed, self._tick = [], 0, now
        return row
