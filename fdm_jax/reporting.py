"""One HTML page about several runs, from what was read of them.  It needs no network and holds no scripts."""

from __future__ import annotations

import base64
import colorsys
import dataclasses
import datetime
import html
import io
import itertools
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fdm_jax import __version__
from fdm_jax.experiment import FREE_FIELDS

SHOWN_GRIDS = 6  # of each run
SHOWN_SIGMAS = 6  # whose errors are drawn over training
MOST_COLUMNS = 6  # of runs in a table

# Two runs are FDM and its baseline if all but these is alike.  What decides the figures themselves is not free: how
# long a run is, where it starts, its data, and what it is evaluated on.
PAIR_FREE = (
    *(name for name in FREE_FIELDS if name not in ("init_from", "train.images", "data.source", "eval.")),
    "momentum.", "warmup_steps", "eval.every_images", "eval.batch_size",
)  # fmt: skip

# {figure: (its name for people, 1 if more is better, -1 if less is)}
FIGURES: dict[str, tuple[str, int]] = {
    "val/error": ("held-out error", -1),
    "eval/fid": ("FID", -1),
    "eval/frechet_distance": ("Fréchet distance", -1),
    "eval/kid": ("KID", -1),
    "eval/kernel_distance": ("kernel distance", -1),
    "eval/precision": ("precision", 1),
    "eval/recall": ("recall", 1),
    "eval/inception_score": ("Inception score", 1),
}
CURVES = ("val/error", "eval/fid", "eval/frechet_distance")  # on the three axes, and in the comparison of pairs

PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d31", "#56b4e9", "#e69f00", "#444444", "#b22222",
)  # fmt: skip
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}


class Point(NamedTuple):
    """One figure of a run: where in training, and what."""

    nimg: float
    seconds: float | None
    value: float
    deviation: float | None = None


class Likelihood(NamedTuple):
    """Bits per dimension: settings of the measurement, mean, its standard error (None for one image), images."""

    settings: dict[str, Any]
    mean: float
    error: float | None
    images: int


class Sweep(NamedTuple):
    """Quality against function evaluations: settings, and a row for each solver, grid and NFE."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclasses.dataclass
class Run:
    """What is known of a run.

    Attributes:
      name: for people; no two runs have the same.
      config: {"train.images": ..., ...}.
      parameters: of the network; None if it is not known.
      flops_per_image: operations per training image; None if not known.
      rows: of metrics.jsonl.
      evaluations: contents of result.json.
      likelihoods, sweeps: see there.
      grids: (images seen, PNG), in order.
    """

    name: str
    config: dict[str, Any]
    parameters: int | None = None
    flops_per_image: int | None = None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    evaluations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    likelihoods: list[Likelihood] = dataclasses.field(default_factory=list)
    sweeps: list[Sweep] = dataclasses.field(default_factory=list)
    grids: list[tuple[int, bytes]] = dataclasses.field(default_factory=list)
    colour: str = PALETTE[0]

    @property
    def momentum(self) -> bool:
        """Whether it is FDM."""
        return bool(self.config.get("momentum.enabled"))

    @property
    def dash(self) -> str:
        """Of its lines."""
        return "-" if self.momentum else "--"

    @property
    def nimg(self) -> float:
        """Images seen."""
        return max((row["nimg"] for row in self.rows), default=0)

    @property
    def seconds(self) -> float | None:
        """Wall time of training."""
        return max((s for row in self.rows if (s := number(row.get("seconds"))) is not None), default=None)

    def points(self, figure: str) -> list[Point]:
        """All finite values of a figure in order of images seen; of several at one place the last."""
        found = {
            row["nimg"]: Point(
                row["nimg"], number(row.get("seconds")), value, number(row.get(f"{figure}_deviation"))
            )
            for row in self.rows
            if (value := number(row.get(figure))) is not None
        }  # fmt: skip
        return [found[nimg] for nimg in sorted(found)]

    def sigmas(self) -> list[float]:
        """Noise levels at which errors were measured."""
        names = {key for row in self.rows for key in row if key.startswith("val/error@")}
        return sorted(level for name in names if (level := _level(name)) is not None)

    def at_sigma(self, sigma: float) -> list[Point]:
        """Points of the error at one noise level."""
        names = {key for row in self.rows for key in row if key.startswith("val/error@")}
        return next((self.points(name) for name in sorted(names) if _level(name) == sigma), [])

    def figures(self) -> set[str]:
        """Names of what was evaluated in training, apart from errors at single noise levels."""
        names = {key for row in self.rows for key in row if key.startswith(("val/", "eval/")) and "@" not in key}
        return {name for name in names if not name.endswith("_deviation") and self.points(name)}


def _level(name: str) -> float | None:
    """The noise level in "val/error@0.05"."""
    try:
        level = float(name.partition("@")[2])
    except ValueError:
        return None
    return level if 0 < level < math.inf else None


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


# --- HTML ---


class Html(str):
    """Text that is HTML already; other text is escaped on its way into an element."""


def element(tag: str, *content: str, **attributes: str | int | None) -> Html:
    """<tag attribute="...">content</tag>; a trailing _ of an attribute is dropped, None leaves it out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    start = f"<{tag}{written}>"
    return Html(start if tag in ("img", "meta") else f"{start}{joined(content)}</{tag}>")


def joined(content: Iterable[str]) -> Html:
    """One piece of HTML."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in content))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Html:
    """A table whose first ``words`` columns are words, and the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> Html:
        return element("tr", *(element(tag, c, class_="number" if i >= words else None) for i, c in enumerate(row)))

    body = element("tbody", *(cells("td", row) for row in rows))
    return element("div", element("table", element("thead", cells("th", head)), body), class_="table")


def note(*content: str) -> Html:
    """A paragraph in small print."""
    return element("p", *content, class_="note")


def section(title: str, *content: str) -> Html:
    """A section, or nothing if there is nothing in it."""
    return element("section", element("h2", title), *content) if any(content) else Html()


def picture(png: bytes, alt: str, class_: str | None = None) -> Html:
    """A PNG inside the page."""
    width, height = struct.unpack(">II", png[16:24])
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return element("img", src=source, alt=alt, width=width, height=height, class_=class_)


def swatch(run: Run) -> Html:
    """The line that the run has in the plots."""
    style = f"border-top: 3px {'solid' if run.momentum else 'dashed'} {run.colour}"
    return element("span", class_="swatch", style=style)


def named(run: Run) -> Html:
    """The run's name with its line."""
    return joined([swatch(run), " ", element("span", run.name, class_="name")])


def legend(runs: Iterable[Run], marks: Mapping[str, str] | None = None) -> Html:
    """Lines of runs, and marks of what else is told apart in a plot: {name: matplotlib's mark}."""
    entries = [named(run) for run in runs] + [joined([MARKS[mark], " ", name]) for name, mark in (marks or {}).items()]
    return element("ul", *(element("li", entry) for entry in entries), class_="legend")


def plot(png: bytes | None, title: str, key: Html, *caption: str) -> Html:
    """A plot with title, legend and caption; nothing if there is no picture."""
    if png is None:
        return Html()
    below = element("figcaption", *caption) if any(caption) else Html()
    return element("figure", element("h3", title), key, picture(png, title, "plot"), below)


# --- Numbers for people ---

ABSENT = "–"


def shown(value: float | None, deviation: float | None = None) -> str:
    """Four digits, or as many as the deviation allows."""
    if value is None:
        return ABSENT
    if deviation:
        digits = min(max(1 - math.floor(math.log10(abs(deviation))), 0), 8)
        return f"{value:.{digits}f}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{deviation:.{digits}f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def counted(n: float) -> str:
    """80000 -> "80,000", 200000000 -> "200 M"."""
    return f"{n / 1e6:.4g} M" if n >= 10_000_000 else f"{n:,.0f}"


def duration(seconds: float | None) -> str:
    """5000 -> "1 h 23 min"."""
    if seconds is None:
        return ABSENT
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def name_of(figure: str) -> str:
    """Of a figure, for people."""
    return FIGURES.get(figure, (figure, 0))[0]


def ordered(figures: Iterable[str]) -> list[str]:
    """The known ones first."""
    known = list(FIGURES)
    return sorted(figures, key=lambda figure: (known.index(figure) if figure in known else len(known), figure))


# --- The page ---


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


def colours(n: int) -> list[str]:
    """So many that can be told apart on white."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    shades = [colorsys.hls_to_rgb(i / n, 0.32 + 0.14 * (i % 2), 0.75) for i in range(n)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in shade) for shade in shades]


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
    speeds = sorted(point.value for point in run.points("img_per_s"))
    return shown(speeds[len(speeds) // 2]) if speeds else ABSENT


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
        notes.append(" Wall time is that of training as a whole, with compilation, evaluations and samples.")
    for run in runs:
        skipped = sum(point.value for point in run.points("bad_gradients"))
        if skipped:
            notes.append(f" {run.name} skipped {skipped:.0f} steps whose gradients were not finite.")
    return joined([table(head, rows, words=4), note(*notes) if notes else ""])


def differing(runs: Sequence[Run]) -> list[str]:
    """Fields of the configurations that are not the same in all runs."""
    names = sorted({name for run in runs for name in run.config})
    return [name for name in names if any(run.config.get(name) != runs[0].config.get(name) for run in runs)]


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
    return joined([table(head, rows), note(*notes) if notes else ""])


def _of_how_many(runs: Sequence[Run]) -> list[str]:
    counts = {
        str(run.config["eval.num_images"])
        for run in runs
        if run.figures() & {"eval/fid", "eval/frechet_distance"} and run.config.get("eval.num_images")
    }
    if not counts:
        return []
    return [
        f" Fréchet distances in training are of {' or '.join(sorted(counts))} generated images; they fall with more."
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


def best_of(points: Sequence[Point], direction: int) -> Point | None:
    """The best point where more (1) or less (-1) is better; None if that is not known."""
    return max(points, key=lambda point: direction * point.value, default=None) if direction else None


class Pair(NamedTuple):
    """A run, and the baseline that it stands beside; ``others`` are fields that had better not differ."""

    run: Run
    base: Run
    others: list[str]

    @property
    def fdm(self) -> bool:
        """Whether it is momentum against none."""
        return self.run.momentum and not self.base.momentum


def find_pairs(runs: Sequence[Run]) -> list[Pair]:
    """FDM runs with the plain runs that are like them in everything else; of just two runs these, whatever they are."""
    if len(runs) == 2:
        run, base = sorted(runs, key=lambda run: run.momentum, reverse=True)
        return [_pair(run, base)] if run.momentum != base.momentum else [_pair(runs[1], runs[0])]
    pairs = [_pair(run, base) for run, base in itertools.product(runs, runs) if run.momentum and not base.momentum]
    return [pair for pair in pairs if not pair.others]


def _pair(run: Run, base: Run) -> Pair:
    return Pair(run, base, [name for name in differing([run, base]) if not name.startswith(PAIR_FREE)])


def common_point(figure: Callable[[Run], list[Point]], pair: Pair) -> tuple[Point, Point] | None:
    """A figure of both runs after the most images that both have it for; None if that or a positive value is missing."""
    ours, theirs = ({point.nimg: point for point in figure(run)} for run in (pair.run, pair.base))
    shared = max(ours.keys() & theirs.keys(), default=None)
    if shared is None or min(ours[shared].value, theirs[shared].value) <= 0:
        return None
    return ours[shared], theirs[shared]


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
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
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


def _measured(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"eval/fid": {"value": ..., ...}}; only Inception's features make an FID or KID."""
    others = {"fid": "frechet_distance", "kid": "kernel_distance"}
    if result["settings"].get("extractor") == "inception":
        others = {}
    return {f"eval/{others.get(k, k)}": v for k, v in result["metrics"].items() if isinstance(v, dict)}


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


# --- Plots ---


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
        _thousands(panel)
    panels[0].set_ylabel(label)
    _scale(panels[0].yaxis, [p.value for run in runs for p in run.points(figure)])
    return _png(canvas)


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
        _scale(place.yaxis, values, 1.4 if title.startswith("σ") else 2.5)
        _thousands(place)
    for place in places[len(panels) :]:
        place.set_visible(False)
    for place in places[max(len(panels) - columns, 0) : len(panels)]:
        place.set_xlabel("images seen")
    return _png(canvas)


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


def _thousands(panel: Any) -> None:
    """1000000 -> "1M" along the x axis."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(5))
    if panel.get_xlim()[1] >= 1000:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _ticks(axis: Any, values: Iterable[float]) -> None:
    """The values themselves, if they are few: the numbers that were chosen say more than powers of ten."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    ticks = sorted(set(values))
    if len(ticks) <= 12:
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
        axis.set_minor_locator(NullLocator())


def _scale(axis: Any, values: Sequence[float], least: float = 2.5) -> None:
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


def _png(canvas: Any) -> bytes:
    file = io.BytesIO()
    canvas.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return file.getvalue()


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


def sigma_png(runs: Sequence[Run], pairs: Sequence[Pair]) -> bytes:
    """Error against noise level, and the ratio to the baseline's error."""
    ratios = [(pair.run, ratio) for pair in pairs if len(ratio := _ratios(pair)) > 1]
    canvas, panels = _canvas(1, 2 if ratios else 1, 3.4)
    last = {
        run.name: [(level, points[-1]) for level in run.sigmas() if (points := run.at_sigma(level))] for run in runs
    }
    for run in runs:
        _line(panels[0], run, last[run.name])
    _scale(panels[0].yaxis, [point.value for places in last.values() for _, point in places])
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
        _ticks(panel.xaxis, [level for places in last.values() for level, _ in places])
        panel.set_xlabel("noise level σ")
    return _png(canvas)


def _ratios(pair: Pair) -> list[tuple[float, Point]]:
    """The run's error over its baseline's at each level, after the most images that both were evaluated at."""
    found = []
    for level in sorted(set(pair.run.sigmas()) & set(pair.base.sigmas())):
        if shared := common_point(lambda run: run.at_sigma(level), pair):  # noqa: B023, called at once
            found.append((level, Point(shared[0].nimg, None, shared[0].value / shared[1].value)))
    return found


# --- Samples ---


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
    caption = joined([title, ", " if title else ""]) if title else Html()
    alt = f"samples of {run.name} after {nimg:,} images"
    return element("figure", picture(png, alt, class_), element("figcaption", caption, f"{counted(nimg)} images"))


# --- Sweeps ---


class Case(NamedTuple):
    """A row of a sweep: whose it is, how it was solved, and {figure: value}."""

    run: Run
    solver: str
    nfe: float
    values: dict[str, tuple[float, float | None]]


def sweep_cases(runs: Sequence[Run]) -> list[Case]:
    """All rows of all sweeps; solvers' names say the grid and the checkpoint where there are several."""
    rows = [(run, sweep, row) for run in runs for sweep in run.sweeps for row in sweep.rows]
    several_grids = len({row["grid"] for _, _, row in rows}) > 1
    several = {run.name for run in runs if len({s.settings.get("checkpoint") for s in run.sweeps}) > 1}
    cases = []
    for run, sweep, row in rows:
        solver = f"{row['solver']}" + (f" ({row['grid']})" if several_grids else "")
        if run.name in several:
            solver += f", step {sweep.settings.get('checkpoint')}"
        values = {}
        if (distance := number(row.get("distance"))) is not None:
            values["RMS distance from the ODE's solution"] = (distance, number(row.get("distance_error")))
        if (frechet := number(row.get("frechet"))) is not None:
            values[_frechet_name(sweep.settings)] = (frechet, None)
        if number(row["nfe"]) and values:
            cases.append(Case(run, solver, row["nfe"], values))
    return cases


def _frechet_name(settings: dict[str, Any]) -> str:
    extractor, images = settings.get("extractor"), settings.get("num")
    what = "FID" if extractor == "inception" else f"Fréchet distance ({extractor})"
    return f"{what}, {images} images, reference {str(settings.get('ref_sha256', '?'))[:6]}"


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
        _ticks(panel.xaxis, [case.nfe for case in of_figure])
        _scale(panel.yaxis, [case.values[figure][0] for case in of_figure])
        panel.set_title(_literal(figure.replace(", ", "\n", 1)), fontsize="medium")
        panel.set_xlabel("function evaluations")
    for panel in panels[len(figures) :]:
        panel.set_visible(False)
    return _png(canvas)


# Browsers fetch nothing for the page, whatever a name in it may say.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #ffffff; --ink: #1c2024; --soft: #5f6872; --line: #dde1e6; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --card: #1d2125; --ink: #e6e9ec; --soft: #9aa4ae; --line: #343a41; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 16px 0 6px; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin-top: 16px; }
.note, figcaption, small { color: var(--soft); font-size: 12.5px; }
.note { margin: 6px 0 0; max-width: 90ch; overflow-wrap: anywhere; }
small { display: block; }
.table { overflow-x: auto; }
table { border-collapse: collapse; min-width: 50%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 8px; border-bottom: 1px solid var(--line); }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { min-width: 140px; }
.number { text-align: right; }
td { overflow-wrap: anywhere; }
td.number { overflow-wrap: normal; }
.swatch { display: inline-block; width: 20px; height: 0; vertical-align: 4px; }
.name { font-weight: 600; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 4px 0 8px; font-size: 13px; }
.legend .name { font-weight: 400; overflow-wrap: anywhere; }
figure { margin: 0 0 20px; }
figcaption { margin-top: 4px; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; }
.plot { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 8px; }
.plot[width="1600"] { width: 100%; }
.plot[width="960"] { width: 60%; }
.grids { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 10px; }
.grids.last { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.grids figure { margin: 0 0 8px; }
.grids img { width: 100%; border-radius: 3px; }
img.last { image-rendering: pixelated; }
details { margin-top: 8px; }
summary { cursor: pointer; }
"""
