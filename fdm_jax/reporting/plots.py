"""Plots of runs beside each other as PNG; matplotlib is imported only when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fdm_jax.pictures import default_style, log_scale, own_ticks, thousands
from fdm_jax.reporting.runs import Case, Pair, Point, Run, common_point


class Axis(NamedTuple):
    """A way to say how far training was: label, and (run, point) -> place, None where it is not known."""

    label: str
    place: Callable[[Run, Point], float | None]


def training_axes(runs: Sequence[Run]) -> list[Axis]:
    """Images seen, operations and wall time, in units that suit the runs."""
    axes = [Axis("images seen", lambda run, point: point.nimg)]
    if most := max((run.nimg * (run.flops_per_image or 0) for run in runs), default=0):
        exponent = int(math.log10(most)) // 3 * 3
        axes.append(
            Axis(
                f"training compute ($10^{{{exponent}}}$ FLOP)",
                lambda run, point: (
                    None if run.flops_per_image is None else point.nimg * run.flops_per_image / 10**exponent
                ),
            )
        )
    if longest := max((run.seconds or 0.0 for run in runs), default=0.0):
        units = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "d"))
        size, unit = next((u for u in reversed(units) if longest >= 3 * u[0]), units[0])
        axes.append(
            Axis(
                f"wall time ({unit})",
                lambda run, point: None if point.seconds is None else point.seconds / size,
            )
        )
    return axes


@default_style()
def curves_png(runs: Sequence[Run], figure: str, label: str) -> bytes | None:
    """A figure of all runs on each axis that there is; None unless some run has two values of it."""
    if all(len(run.points(figure)) < 2 for run in runs):
        return None
    axes = [
        axis
        for axis in training_axes(runs)
        if any(sum(axis.place(run, p) is not None for p in run.points(figure)) > 1 for run in runs)
    ]
    canvas, panels = _canvas(1, len(axes), 3.3, sharey=True)
    for panel, axis in zip(panels, axes, strict=True):
        for run in runs:
            _line(panel, run, [(x, p) for p in run.points(figure) if (x := axis.place(run, p)) is not None])
        panel.set_xlabel(axis.label)
        thousands(panel)
    panels[0].set_ylabel(label)
    log_scale(panels[0].yaxis, [p.value for run in runs for p in run.points(figure)])
    return _png(canvas)


@default_style()
def small_png(runs: Sequence[Run], panels: Sequence[tuple[str, Mapping[str, list[Point]]]]) -> bytes | None:
    """Small plots over images seen, three in a row.

    Args:
      runs: for their colours.
      panels: (title, {name of a run: points}) of each; those without a curve are left out.
    """
    panels = [panel for panel in panels if any(len(points) > 1 for points in panel[1].values())]
    if not panels:
        return None
    columns = min(len(panels), 3)
    canvas, places = _canvas(-(-len(panels) // columns), columns, 2.5)
    for place, (title, points) in zip(places, panels, strict=False):
        for run in runs:
            _line(place, run, [(point.nimg, point) for point in points[run.name]])
        place.set_title(_literal(title), fontsize="medium")
        # Panels of one quantity are all drawn in one way.
        values = [point.value for each in points.values() for point in each]
        log_scale(place.yaxis, values, 1.4 if title.startswith("σ") else 2.5)
        thousands(place)
    for place in places[len(panels) :]:
        place.set_visible(False)
    for place in places[max(len(panels) - columns, 0) : len(panels)]:
        place.set_xlabel("images seen")
    return _png(canvas)


@default_style()
def sigma_png(runs: Sequence[Run], pairs: Sequence[Pair]) -> bytes:
    """Error against noise level, and the ratio to the baseline's error."""
    ratios = [(pair.run, ratio) for pair in pairs if len(ratio := _ratios(pair)) > 1]
    canvas, panels = _canvas(1, 2 if ratios else 1, 3.4)
    last = {
        run.name: [(level, points[-1]) for level in run.sigmas() if (points := run.at_sigma(level))] for run in runs
    }
    for run in runs:
        _line(panels[0], run, last[run.name])
    log_scale(panels[0].yaxis, [point.value for places in last.values() for _, point in places])
    panels[0].set_ylabel("held-out error")
    if ratios:
        panels[1].axhline(1, color="#888888", linewidth=1)
        for run, places in ratios:
            _line(panels[1], run, places)
        panels[1].set_ylabel(
            "error of FDM / error of plain" if pairs[0].fdm else "error of the second / error of the first"
        )
    for panel in panels:
        panel.set_xscale("log")
        own_ticks(panel.xaxis, [level for places in last.values() for level, _ in places])
        panel.set_xlabel("noise level σ")
    return _png(canvas)


def _ratios(pair: Pair) -> list[tuple[float, Point]]:
    """The run's error over its baseline's at each level, after the most images that both were evaluated at."""
    found = []
    for level in sorted(set(pair.run.sigmas()) & set(pair.base.sigmas())):
        if shared := common_point(lambda run: run.at_sigma(level), pair):  # noqa: B023, called at once
            found.append((level, Point(shared[0].nimg, None, shared[0].value / shared[1].value)))
    return found


@default_style()
def sweep_png(cases: Sequence[Case], figures: Sequence[str], marks: Mapping[str, str]) -> bytes:
    """Each figure against NFE; colours are runs, marks are solvers."""
    columns = min(len(figures), 2)
    canvas, panels = _canvas(-(-len(figures) // columns), columns, 3.6)
    for panel, figure in zip(panels, figures, strict=False):
        of_figure = [case for case in cases if figure in case.values]
        groups: dict[tuple[str, str], list[Case]] = {}
        for case in sorted(of_figure, key=lambda case: case.nfe):
            groups.setdefault((case.run.name, case.solver), []).append(case)
        for (_, solver), line in groups.items():
            nfe, value, run = [case.nfe for case in line], [case.values[figure][0] for case in line], line[0].run
            panel.plot(nfe, value, run.dash, color=run.colour, marker=marks[solver], markersize=5, linewidth=1.2)
        panel.set_xscale("log")
        own_ticks(panel.xaxis, [case.nfe for case in of_figure])
        log_scale(panel.yaxis, [case.values[figure][0] for case in of_figure])
        panel.set_title(_literal(figure.replace(", ", "\n", 1)), fontsize="medium")
        panel.set_xlabel("function evaluations")
    for panel in panels[len(figures) :]:
        panel.set_visible(False)
    return _png(canvas)


# --- Drawing ---


def _canvas(rows: int, columns: int, height: float, **kwargs: Any) -> tuple[Any, list[Any]]:
    """A figure and its panels in a list."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and may want a display

    canvas = Figure(figsize=(10 if columns > 1 else 6, height * rows), layout="constrained")
    panels = list(canvas.subplots(rows, columns, squeeze=False, **kwargs).flat)
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8.5)
        panel.spines[["top", "right"]].set_visible(False)
    return canvas, panels


def _line(panel: Any, run: Run, places: Sequence[tuple[float, Point]]) -> None:
    """One run's curve with its deviations; few points get marks, a single one would not show without."""
    if not places:
        return
    x, y = [place for place, _ in places], [point.value for _, point in places]
    mark = "o" if len(places) <= 30 else ""
    panel.plot(x, y, color=run.colour, linestyle=run.dash, marker=mark, markersize=3, linewidth=1.5)
    if any(point.deviation for _, point in places):
        low, high = ([p.value + sign * (p.deviation or 0) for _, p in places] for sign in (-1, 1))
        panel.fill_between(x, low, high, color=run.colour, alpha=0.15, linewidth=0)


def _literal(text: str) -> str:
    """Text of others, for matplotlib, which takes what is between dollars for a formula."""
    return text.replace("$", r"\$")


def _png(canvas: Any) -> bytes:
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()
