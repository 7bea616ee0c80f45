"""The page as a whole, and its sections that hold pictures: curves, errors by noise level, samples, sweeps."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence

from fdm_jax import __version__
from fdm_jax.reporting.markup import (
    MARKS,
    POLICY,
    STYLE,
    Html,
    counted,
    element,
    joined,
    legend,
    named,
    note,
    picture,
    plot,
    section,
    shown,
    table,
)
from fdm_jax.reporting.plots import curves_png, sigma_png, small_png, sweep_png
from fdm_jax.reporting.runs import CURVES, Pair, Run, colours, find_pairs, name_of, ordered, sweep_cases
from fdm_jax.reporting.tables import (
    differences,
    evaluations_table,
    likelihoods_table,
    pair_lines,
    results_table,
    runs_table,
)

SHOWN_GRIDS = 6  # of each run
SHOWN_SIGMAS = 6  # whose errors are drawn over training


def page(runs: Sequence[Run], made: datetime.datetime) -> str:
    """The whole page; gives the runs their colours."""
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        run.colour = colour
    pairs = find_pairs(runs)
    title = f"Fast Diffusion Model: {runs[0].name}" if len(runs) == 1 else f"Fast Diffusion Model: {len(runs)} runs"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", Html(STYLE)),
    )  # fmt: skip
    body = element(
        "main",
        element("h1", title),
        note(f"Made on {made:%Y-%m-%d at %H:%M %Z} by fdm_jax {__version__}."),
        section("Runs", runs_table(runs), differences(runs)),
        section("Results", results_table(runs), pair_lines(pairs), evaluations_table(runs), likelihoods_table(runs)),
        section("Curves", *curves(runs)),
        section("Error by noise level", *sigma_plots(runs, pairs)),
        section("Samples", *samples(runs)),
        section("Quality against function evaluations", *sweep_plots(runs)),
    )
    return "<!DOCTYPE html>\n" + element("html", head, element("body", body), lang="en") + "\n"


# --- Sections ---


def curves(runs: Sequence[Run]) -> list[Html]:
    """Figures over training, on each of the axes."""
    held_out = "On images not trained on, with one weighting of noise levels for all families."
    parts = []
    for figure in CURVES:
        name, caption = name_of(figure), held_out if figure == "val/error" else ""
        parts.append(plot(curves_png(runs, figure, name), name[0].upper() + name[1:], _key(runs, figure), caption))
    others = [f for f in ordered(set().union(*(run.figures() for run in runs))) if f not in CURVES]
    panels = [(name_of(figure), {run.name: run.points(figure) for run in runs}) for figure in others]
    parts.append(plot(small_png(runs, panels), "Other figures", legend(runs)))
    comparable = (
        "Training losses are of each family's own weights, and of weights cut off during a warm-up: they can be compared "
        "only between runs of one family, after the warm-up."
    )
    parts.append(plot(curves_png(runs, "loss", "training loss"), "Training loss", _key(runs, "loss"), comparable))
    if any(parts):
        parts.append(_about_axes(runs))
    return parts


def _key(runs: Sequence[Run], figure: str) -> Html:
    return legend([run for run in runs if run.points(figure)])


def _about_axes(runs: Sequence[Run]) -> Html:
    lines = []
    if any(run.flops_per_image for run in runs):
        lines.append(
            "Training compute is images seen times the operations of one image, forward and backward, in convolutions and "
            "matrix products (2 to a multiply-add)."
        )
    unknown = [run.name for run in runs if run.flops_per_image is None]
    timeless = [run.name for run in runs if run.rows and run.seconds is None]
    if unknown:
        lines.append(f"The operations of {', '.join(unknown)} are not known: this version cannot make such a network.")
    if timeless:
        lines.append(f"No wall time was recorded for {', '.join(timeless)}.")
    return note(" ".join(lines)) if lines else Html()


def sigma_plots(runs: Sequence[Run], pairs: Sequence[Pair]) -> list[Html]:
    """Errors against the noise level at the last evaluation, and over training at some levels."""
    with_levels = [run for run in runs if run.sigmas()]
    if not with_levels:
        return []
    levels = sorted({level for run in with_levels for level in run.sigmas()})
    chosen = [levels[i] for i in spread(len(levels), SHOWN_SIGMAS)]
    panels = [(f"σ = {level:g}", {run.name: run.at_sigma(level) for run in runs}) for level in chosen]
    key = legend(with_levels)
    after = "; ".join(f"{run.name} after {counted(_last_of_levels(run))} images" for run in with_levels)
    return [
        plot(sigma_png(with_levels, pairs), "Held-out error at each noise level, last evaluation", key, f"{after}."),
        plot(small_png(runs, panels), "Held-out error at some noise levels, over training", key),
    ]


def _last_of_levels(run: Run) -> float:
    return max(points[-1].nimg for level in run.sigmas() if (points := run.at_sigma(level)))


def spread(n: int, most: int) -> list[int]:
    """Up to ``most`` indices below n, evenly spread, with the first and the last."""
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def samples(runs: Sequence[Run]) -> list[Html]:
    """The last grids beside each other, and under them earlier ones, a row per run."""
    with_grids = [run for run in runs if run.grids]
    if not with_grids:
        return []
    last = [_grid(run, *run.grids[-1], class_="last", title=named(run)) for run in with_grids]
    parts = [element("div", *last, class_="grids last")]
    for run in with_grids:
        earlier = spread(len(run.grids), SHOWN_GRIDS)[:-1]
        if earlier:
            row = [_grid(run, *run.grids[i]) for i in earlier]
            parts += [element("h3", named(run), ", earlier"), element("div", *row, class_="grids")]
    return parts


def _grid(run: Run, nimg: int, png: bytes, class_: str | None = None, title: Html | None = None) -> Html:
    caption = joined([title, ", "]) if title else Html()
    alt = f"samples of {run.name} after {nimg:,} images"
    return element("figure", picture(png, alt, class_), element("figcaption", caption, f"{counted(nimg)} images"))


def sweep_plots(runs: Sequence[Run]) -> list[Html]:
    """A plot for each figure, and all of it in a table that opens."""
    cases = sweep_cases(runs)
    if not cases:
        return []
    solvers = list(dict.fromkeys(case.solver for case in cases))
    marks = dict(zip(solvers, itertools.cycle(MARKS), strict=False))
    figures = list(dict.fromkeys(figure for case in cases for figure in case.values))
    shown_runs = [run for run in runs if any(case.run is run for case in cases)]
    title = "By solver and number of function evaluations (NFE)"
    rows = [
        (named(case.run), case.solver, f"{case.nfe:g}", *(shown(*case.values.get(f, (None, None))) for f in figures))
        for case in cases
    ]
    details = element("summary", "All figures as a table"), table(("run", "solver", "NFE", *figures), rows, words=2)
    return [plot(sweep_png(cases, figures, marks), title, legend(shown_runs, marks)), element("details", *details)]
