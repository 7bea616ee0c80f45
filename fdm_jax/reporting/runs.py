"""What was read of runs, and what follows from it: figures, pairs of FDM and its baseline, rows of sweeps."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fdm_jax.experiment import FREE_FIELDS

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
        """Noise levels at which errors were measured, and are finite."""
        names = {key for row in self.rows for key in row if key.startswith("val/error@")}
        return sorted(level for name in names if (level := _level(name)) is not None and self.points(name))

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


def best_of(points: Sequence[Point], direction: int) -> Point | None:
    """The best point where more (1) or less (-1) is better; None if that is not known."""
    return max(points, key=lambda point: direction * point.value, default=None) if direction else None


def name_of(figure: str) -> str:
    """Of a figure, for people."""
    return FIGURES.get(figure, (figure, 0))[0]


def ordered(figures: Iterable[str]) -> list[str]:
    """The known ones first."""
    known = list(FIGURES)
    return sorted(figures, key=lambda figure: (known.index(figure) if figure in known else len(known), figure))


def colours(n: int) -> list[str]:
    """So many that can be told apart on white."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    shades = [colorsys.hls_to_rgb(i / n, 0.32 + 0.14 * (i % 2), 0.75) for i in range(n)]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in shade) for shade in shades]


def differing(runs: Sequence[Run]) -> list[str]:
    """Fields of the configurations that are not the same in all runs."""
    names = sorted({name for run in runs for name in run.config})
    return [name for name in names if any(run.config.get(name) != runs[0].config.get(name) for run in runs)]


# --- Pairs ---


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


# --- Sweeps ---


class Case(NamedTuple):
    """A row of a sweep: whose it is, how it was solved, and {figure: value}."""

    run: Run
    solver: str
    nfe: float
    values: dict[str, tuple[float, float | None]]


# What may tell the curves of a run's sweeps apart; the Frechet distance names its own settings.
SWEEP_SETTINGS = (
    "checkpoint", "class", "guidance", "guidance_interval", "guide", "seeds", "sigma_min", "sigma_max", "rho",
    "match_original",
)  # fmt: skip


def sweep_cases(runs: Sequence[Run]) -> list[Case]:
    """All rows of all sweeps; solvers' names say the grid, the checkpoint and other settings where there are several."""
    rows = [(run, sweep, row) for run in runs for sweep in run.sweeps for row in sweep.rows]
    several_grids = len({row["grid"] for _, _, row in rows}) > 1
    several = {
        run.name: [n for n in SWEEP_SETTINGS if len({str(s.settings.get(n)) for s in run.sweeps}) > 1] for run in runs
    }
    cases = []
    for run, sweep, row in rows:
        solver = f"{row['solver']}" + (f" ({row['grid']})" if several_grids else "")
        for name in several[run.name]:
            solver += f", {'step' if name == 'checkpoint' else name} {sweep.settings.get(name)}"
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
