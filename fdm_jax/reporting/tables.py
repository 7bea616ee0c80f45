"""What the page says in tables and words: the runs and where they differ, results, FDM against its baseline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from fdm_jax.reporting.markup import ABSENT, Html, counted, duration, element, joined, named, note, shown, table
from fdm_jax.reporting.runs import (
    CURVES,
    FIGURES,
    Pair,
    Point,
    Run,
    best_of,
    common_point,
    differing,
    name_of,
    number,
    ordered,
)

MOST_COLUMNS = 6  # of runs in a table


def runs_table(runs: Sequence[Run]) -> Html:
    """A row per run: what it is and how far it got."""
    rows = [
        (
            named(run), described(run), _data(run), _network(run),
            ABSENT if run.parameters is None else counted(run.parameters),
            str(run.config.get("train.batch_size", ABSENT)), _images_seen(run), duration(run.seconds), _speed(run),
        )
        for run in runs
    ]  # fmt: skip
    head = ("run", "model", "data", "network", "parameters", "batch", "images seen", "wall time", "img/s")
    notes = ["img/s is the median."] if any(run.points("img_per_s") for run in runs) else []
    if any(run.seconds for run in runs):
        notes.append("Wall time is that of training as a whole, with compilation, evaluations and samples.")
    for run in runs:
        if bad := sum(point.value for point in run.points("bad_gradients")):
            notes.append(f"{counted(bad)} values of {run.name}'s gradients were not finite; no step was skipped.")
    return joined([table(head, rows, words=4), note(" ".join(notes)) if notes else ""])


def described(run: Run) -> str:
    """What a run is: "EDM with momentum, multiplier 2"."""
    family = str(run.config.get("family.name", "model of an unknown family")).upper()
    if not run.momentum:
        return f"{family}, plain"
    multiplier = number(run.config.get("momentum.multiplier"))
    return f"{family} with momentum" + ("" if multiplier is None else f", multiplier {multiplier:g}")


def _data(run: Run) -> str:
    config = run.config
    size, channels = config.get("data.resolution"), config.get("data.channels")
    shape = f" {size}x{size}x{channels}" if size and channels else ""
    return f"{config.get('data.source', ABSENT)}{shape}" + (
        ", by class" if config.get("data.class_conditional") else ""
    )


def _network(run: Run) -> str:
    config = run.config
    mult = config.get("network.channel_mult")
    widths = f" x ({', '.join(map(str, mult))})" if isinstance(mult, list | tuple) else ""
    return (
        f"{config.get('network.preset', ABSENT)}, {config.get('network.model_channels', '?')}{widths} channels, "
        f"{config.get('network.dtype', 'float32')}"
    )


def _images_seen(run: Run) -> str:
    if not run.rows:
        return ABSENT
    goal = number(run.config.get("train.images"))
    return counted(run.nimg) + (f" of {counted(goal)}" if goal and run.nimg < goal else "")


def _speed(run: Run) -> str:
    speeds = [point.value for point in run.points("img_per_s")]
    return shown(statistics.median(speeds)) if speeds else ABSENT


def differences(runs: Sequence[Run]) -> Html:
    """What tells the runs' configurations apart."""
    if len(runs) < 2:
        return Html()
    fields = differing(runs)
    if not fields:
        return note("The configurations are the same.")
    title = element("h3", "Where the configurations differ")
    if len(runs) > MOST_COLUMNS:
        by_value = [(field, _by_value(runs, field)) for field in fields]
        return joined([title, table(("field", "values and their runs"), by_value, words=2)])
    rows = [(field, *(_setting(run.config.get(field)) for run in runs)) for field in fields]
    head = ("field", *(named(run) for run in runs))
    return joined([title, table(head, rows, words=len(head))])


def _by_value(runs: Sequence[Run], field: str) -> Html:
    names: dict[str, list[str]] = {}
    for run in runs:
        names.setdefault(_setting(run.config.get(field)), []).append(run.name)
    return joined([element("div", f"{value}: {', '.join(of)}") for value, of in names.items()])


def _setting(value: Any) -> str:
    if value is None:
        return ABSENT
    return f"({', '.join(map(str, value))})" if isinstance(value, list | tuple) else str(value)


# --- Results ---


def results_table(runs: Sequence[Run]) -> Html:
    """The last figures of training, and the best."""
    figures = ordered(set().union(*(run.figures() for run in runs)))
    losses = any(run.points("loss") for run in runs)
    if not (figures or losses):
        return Html()
    columns = (["loss"] if losses else []) + figures
    rows = [(named(run), *(_last_and_best(run, figure) for figure in columns)) for run in runs]
    head = ("run", *("training loss" if figure == "loss" else name_of(figure) for figure in columns))
    notes = ["Last values; the best where it was an earlier one."] if figures else []
    notes += _of_how_many(runs)
    return joined([table(head, rows), note(" ".join(notes)) if notes else ""])


def _of_how_many(runs: Sequence[Run]) -> list[str]:
    counts = {
        str(run.config["eval.num_images"])
        for run in runs
        if run.figures() & {"eval/fid", "eval/frechet_distance"} and run.config.get("eval.num_images")
    }
    if not counts:
        return []
    return [
        f"Fréchet distances in training are of {' or '.join(sorted(counts))} generated images; they fall with more."
    ]


def _last_and_best(run: Run, figure: str) -> Html:
    points = run.points(figure)
    if not points:
        return Html(ABSENT)
    last = points[-1]
    parts = [shown(last.value, last.deviation)]
    if figure != "loss" and last.nimg < run.nimg:
        parts.append(element("small", f"at {counted(last.nimg)}"))
    best = best_of(points, FIGURES.get(figure, ("", 0))[1])
    if best is not None and best.nimg != last.nimg:
        parts.append(element("small", f"best {shown(best.value, best.deviation)} at {counted(best.nimg)}"))
    return joined(parts)


def pair_lines(pairs: Sequence[Pair]) -> Html:
    """Each run's figures against its baseline's, in words."""
    lines: list[str] = []
    for figure in CURVES:
        ratios = {}
        for pair in pairs:
            if shared := common_point(lambda run: run.points(figure), pair):  # noqa: B023, called at once
                ratios[pair.run.name, pair.base.name] = shared[0].value / shared[1].value
                lines.append(pair_line(pair, figure, *shared))
        if len(ratios) > 1:
            mean = statistics.geometric_mean(ratios.values())
            span = f"from {min(ratios.values()):.3f} to {max(ratios.values()):.3f}"
            lines.append(f"{name_of(figure)}, all {len(ratios)} pairs: ratio {mean:.3f} in the geometric mean, {span}.")
    if not lines:
        return Html()
    title = "FDM against its baseline" if pairs[0].fdm else "One run against the other"
    return joined([element("h3", title), element("ul", *(element("li", line) for line in lines))])


def pair_line(pair: Pair, figure: str, ours: Point, theirs: Point) -> str:
    """Ratio at the same place, how early FDM was where the baseline ended, and what else may be the cause."""
    parts = [
        f"{name_of(figure)} of {pair.run.name} / {pair.base.name}: {shown(ours.value)} / {shown(theirs.value)} = "
        f"{ours.value / theirs.value:.3f} after {counted(ours.nimg)} images."
    ]
    if pair.fdm:
        parts.append(_share(pair, figure))
        if pair.others:
            parts.append(f"The two also differ in {', '.join(pair.others)}.")
    return " ".join(parts)


def _share(pair: Pair, figure: str) -> str:
    """FDM's images until an evaluation first was as good as the baseline's last, as a share of the baseline's."""
    name, theirs = pair.run.name, pair.base.points(figure)
    goal = theirs[-1]
    first = next((point for point in pair.run.points(figure) if point.value <= goal.value), None)
    if first is None:
        return f"{name} did not get to the plain run's last {shown(goal.value)}."
    own = next(point for point in theirs if point.value <= goal.value)
    also = f"; the plain run itself first was there after {counted(own.nimg)}" if own.nimg < goal.nimg else ""
    share = f"{first.nimg / max(goal.nimg, 1):.0%} of the plain run's {counted(goal.nimg)}"
    return (
        f"{name} had the plain run's last {shown(goal.value)} in its evaluation after {counted(first.nimg)} images, "
        f"{share}{also}."
    )


def evaluations_table(runs: Sequence[Run]) -> Html:
    """Results of `fdm evaluate`; those against the same real images stand together."""
    results = [(run, result, _measured(result)) for run in runs for result in run.evaluations]
    if not results:
        return Html()
    figures = ordered(set().union(*(measured for _, _, measured in results)))
    results.sort(key=lambda each: [str(each[1]["settings"].get(k)) for k in ("extractor", "ref_sha256", "num")])
    rows = [
        (
            named(run), _features(result["settings"]), _sampler(result["settings"]),
            counted(number(result.get("images")) or 0),
            *(
                shown(number(measured[figure].get("value")), number(measured[figure].get("deviation")))
                if figure in measured else ABSENT
                for figure in figures
            ),
        )
        for run, result, measured in results
    ]  # fmt: skip
    head = ("run", "features and reference", "sampler", "images", *map(name_of, figures))
    return joined([
        element("h3", "Evaluations of generated images"), table(head, rows, words=3),
        note("Compare only figures of the same features, the same reference and the same number of images."),
    ])  # fmt: skip


def _measured(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"eval/fid": {"value": ..., ...}}; only Inception's features make an FID or KID."""
    others = {"fid": "frechet_distance", "kid": "kernel_distance"}
    if result["settings"].get("extractor") == "inception":
        others = {}
    return {f"eval/{others.get(k, k)}": v for k, v in result["metrics"].items() if isinstance(v, dict)}


def _features(settings: dict[str, Any]) -> str:
    about = settings.get("ref_description")
    data = about.get("data") if isinstance(about, dict) else None
    against = f"{data or settings.get('ref', '')} ({str(settings.get('ref_sha256', '?'))[:6]})"
    return f"{settings.get('extractor', '?')}, {against}"


def _sampler(settings: dict[str, Any]) -> str:
    parts = [str(settings.get("solver", "?")), f"{settings.get('nfe', '?')} NFE"]
    if settings.get("checkpoint") is not None:
        parts.append(f"step {settings['checkpoint']}")
    if settings.get("class") is not None:
        parts.append(f"class {settings['class']}")
    if settings.get("guidance") is not None:
        parts.append(f"guidance {settings['guidance']}")
    usual = {"grid": "edm", "guide": None, "guidance_interval": "0,inf", "S_churn": 0, "match_original": False}
    parts += [f"{name} {settings[name]}" for name, value in usual.items() if settings.get(name, value) != value]
    return ", ".join(parts)


def likelihoods_table(runs: Sequence[Run]) -> Html:
    """Results of `fdm likelihood`."""
    rows = [
        (
            named(run), f"{each.settings.get('data', '?')}, {each.settings.get('split', '?')}",
            "exact trace" if each.settings.get("exact") else f"Hutchinson, {each.settings.get('draws', 1)} per image",
            f"step {each.settings.get('checkpoint', '?')}", counted(each.images), shown(each.mean, each.error),
        )
        for run in runs
        for each in run.likelihoods
    ]  # fmt: skip
    if not rows:
        return Html()
    head = ("run", "data", "method", "checkpoint", "images", "bits per dimension")
    return joined([element("h3", "Likelihood"), table(head, rows, words=4), note("± is the standard error.")])
