"""Pictures for people to look at: grids of images, and curves."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fdm_jax.errors import UserError
from fdm_jax.whole_files import place, write_whole


def image_grid(images: np.ndarray, columns: int, *, scale: int = 1, gap: int = 1) -> Image.Image:
    """Lay images out row by row on black, which also fills up the last row.

    Args:
      images: uint8 [N, H, W, C], grey (C = 1) or RGB (C = 3).
      columns: images per row, where there are as many.
      scale: whole-number enlargement of each pixel, gaps included.
      gap: pixels between images and around them, before enlargement.

    Returns:
      A picture of mode L or RGB, scale * (columns * (W + gap) + gap) wide.

    Raises:
      UserError: images of another kind, or a number that is too small.
    """
    if images.ndim != 4 or not len(images):
        raise UserError(f"A grid takes images of the shape [N, H, W, C], and these have {list(images.shape)}.")
    if columns < 1 or scale < 1 or gap < 0:
        raise UserError(
            "A grid takes columns and scale of 1 or more and a gap of 0 or more, "
            f"and these are {columns}, {scale} and {gap}."
        )
    n, height, width, channels = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.zeros((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), images.dtype)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return _picture(sheet.repeat(scale, axis=0).repeat(scale, axis=1))


def save_png(image: Image.Image | np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write a picture, whole or not at all, into a folder that is made; an array is uint8 [H, W, C], C being 1 or 3.

    Raises:
      UserError: the file cannot be written, or the array is of another kind.
    """
    picture = image if isinstance(image, Image.Image) else _picture(image)
    _write(path, lambda file: picture.save(file, format="PNG"))


@contextlib.contextmanager
def default_style() -> Iterator[None]:
    """matplotlib with its own settings, for a block or, as a decorator, a function.

    What is in a user's matplotlibrc is for other figures: LaTeX that is not installed would end a run at its first plot.
    """
    from matplotlib import style  # takes half a second, which most commands need not wait

    with style.context("default"):
        yield


@default_style()
def curves_png(
    path: str | os.PathLike[str],
    series: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]],
    xlabel: str,
    ylabel: str,
    *,
    logx: bool = False,
    logy: bool = False,
    marker: str = "",
) -> None:
    """Draw lines into a PNG, written whole or not at all.

    Args:
      path: the file.
      series: {name: (x, y)}; the names are shown if there are several.
      xlabel, ylabel: what the axes are.
      logx, logy: whether the axes are logarithmic; that of y is where its values differ much.
      marker: matplotlib's mark of each point, such as "o".

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may want a display

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes: Any = figure.subplots()
    for name, (x, y) in series.items():
        axes.plot(x, y, label=name, marker=marker, markersize=4)
    if logx:
        axes.set_xscale("log")
        own_ticks(axes.xaxis, (value for x, _ in series.values() for value in x))
    else:
        thousands(axes)
    if logy:
        log_scale(axes.yaxis, [value for _, y in series.values() for value in y if np.isfinite(value)])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend()
    _write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def own_ticks(axis: Any, values: Iterable[float]) -> None:
    """Put matplotlib's ticks where values are, if they are few: the numbers that were chosen say more than powers of ten."""
    ticks = sorted(set(values))
    if len(ticks) <= 12:
        axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)


def thousands(panel: Any) -> None:
    """1000000 -> "1M" along the x axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(5))
    if panel.get_xlim()[1] >= 1000:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def log_scale(axis: Any, values: Sequence[float], least: float = 2.5) -> None:
    """Logarithmic where values span more than a factor of ``least``, with ticks that are read easily; else as it is."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if not values or min(values) <= 0 or max(values) < least * min(values):
        return
    low, high = min(values) / 1.1, max(values) * 1.1
    decades = math.log10(high / low)
    steps = (1,) if decades > 3.5 else (1, 3) if decades > 2 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 3, 4, 6, 8)
    every = [s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in steps]
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    getattr(axis.axes, f"set_{axis.axis_name}lim")(low, high)
    axis.set_major_locator(FixedLocator([tick for tick in every if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


@default_style()
def rows_png(path: str | os.PathLike[str], rows: Mapping[str, np.ndarray]) -> None:
    """Draw rows of images under each other, each with its name at the left, into a PNG.

    Args:
      path: the file.
      rows: {name: uint8 [N, H, W, C]}, all of one shape.

    Raises:
      UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    count, height, width = next(iter(rows.values())).shape[:3]
    figure = Figure(figsize=(1.8 + 0.5 * count, 0.2 + 0.6 * len(rows) * height / width), layout="constrained")
    for axes, (name, images) in zip(np.atleast_1d(figure.subplots(len(rows))), rows.items(), strict=True):
        axes.imshow(np.asarray(image_grid(images, count)), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set(xticks=[], yticks=[], anchor="W")
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    _write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _picture(image: np.ndarray) -> Image.Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise UserError(
            "A picture is made of uint8 pixels with 1 or 3 channels in the last axis, "
            f"not of {image.dtype} in the shape {list(image.shape)}."
        )
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def _write(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Let ``write`` fill a picture, whole or not at all; its folder is made."""

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    write_whole(place(path), fill, flush=False)  # it can be drawn again, and a run need not wait for a busy disk
