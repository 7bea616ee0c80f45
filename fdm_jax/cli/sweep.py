"""Compare solvers on one checkpoint: quality against the number of function evaluations (NFE).

  fdm sweep --workdir=runs/digits --out=sweep
  fdm sweep --workdir=runs/cifar10 --out=sweep --solvers=heun,unipc-3,dpmpp-3m --grids=edm,log-snr --nfe=5,10,20,40
  fdm sweep --workdir=runs/cifar10 --out=sweep --ref=cifar10.npz --weights=inception.safetensors --num=10000

Quality is the distance from what the solvers approximate, the probability-flow ODE of the same seeds solved by an
adaptive method of order 8, in float32: the root mean square over pixels in [-1, 1], averaged over images.  (A network
that computes in bfloat16 adds its rounding to the distance of every solver.)  With statistics of real images it is also
the Frechet distance, and then stochastic solvers can take part.  The folder gets table.csv, table.json, distance.png,
frechet.png and samples.png, the same seeds at each NFE.  A command that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fdm_jax.cli.checks import need_positive
from fdm_jax.cli.generate import parse_seeds
from fdm_jax.cli.places import path_argument, place_argument
from fdm_jax.cli.sampling import (
    CHURN,
    Loaded,
    add_checkpoint_argument,
    add_class_argument,
    add_range_and_guidance,
    check_solved,
    check_tolerance,
    load_guidance,
    load_with_guide,
    make_sampler,
)
from fdm_jax.errors import UserError, nearest
from fdm_jax.progress import say
from fdm_jax.whole_files import check_unclaimed, made_again, resolved

if TYPE_CHECKING:
    from fdm_jax.evaluation.extractors import Extractor
    from fdm_jax.evaluation.references import Reference

HELP = "compare solvers on one checkpoint"

RESULTS = "results.jsonl"
# What is written beside them.
WRITTEN = ("table.csv", "table.json", "distance.png", "frechet.png", "samples.png", "reference.npy", "parts")
SHOWN = 8  # images in a row of the picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.cli.evaluate import add_extractor_arguments

    parser.add_argument("--workdir", required=True, type=place_argument, metavar="DIR", help="workdir of the run")
    parser.add_argument("--out", required=True, type=path_argument, metavar="DIR", help="folder of the results")
    parser.add_argument("--solvers", default="heun,euler,dpmpp-2m,unipc-2,deis-3", help="default: %(default)s")
    parser.add_argument("--grids", default="edm", help="edm, log-snr, vp-uniform, vp-quadratic (default: %(default)s)")
    parser.add_argument("--nfe", default="5,9,17,35", help="at most so many evaluations (default: %(default)s)")
    parser.add_argument("--seeds", default="0-63", help="of the distance, such as 0-63 (default: %(default)s)")
    add_class_argument(parser)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the ODE's solution (default: %(default)s)")
    parser.add_argument(
        "--ref", type=place_argument, metavar="STATS.npz", help="statistics of real images (fdm evaluate ref)"
    )
    add_extractor_arguments(parser, "default: what the statistics were made with, else inception")
    parser.add_argument(
        "--num", type=int, default=1000, metavar="N", help="images of the Frechet distance (default: %(default)s)"
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    add_range_and_guidance(parser)
    parser.set_defaults(**CHURN, steps=None)


def run(args: argparse.Namespace) -> int:
    from fdm_jax.cli.evaluate import open_reference
    from fdm_jax.training.locking import locked

    seeds, cases = parse_seeds(args.seeds), choose_cases(args)
    need_positive(args, "batch")
    if args.num < 2:
        raise UserError(f"--num is {args.num}, which is too few.")
    check_tolerance(args.tolerance)
    if args.ref is None and (args.extractor or args.weights):
        raise UserError(
            f"--{'extractor' if args.extractor else 'weights'} is for the Frechet distance, which needs --ref=STATS.npz too "
            "(made by `fdm evaluate ref`)."
        )
    model = load_with_guide(args)
    judge = None
    if args.ref is not None:
        judge = open_reference(args.ref, args.extractor, args.weights, model.experiment.image_shape)
    if not any((args.out / name).exists() for name in (RESULTS, ".lock")):  # it is no sweep's
        check_unclaimed(args.out, WRITTEN, "--out")
    with locked(args.out):
        return _sweep(args, seeds, cases, model, judge)


def _sweep(
    args: argparse.Namespace, seeds: np.ndarray, cases: list[Case], model: Loaded,
    judge: tuple[Reference, Extractor] | None,
) -> int:  # fmt: skip
    """Go on with the results in the folder, and draw all of them."""
    from fdm_jax.cli.record import Record
    from fdm_jax.sampling.generate import NotFinite

    record = Record(args.out / RESULTS, {
        "workdir": str(resolved(args.workdir)), "seeds": args.seeds, "class": args.label,
        "tolerance": args.tolerance, "sigma_min": args.sigma_min, "sigma_max": args.sigma_max, "rho": args.rho,
        "match_original": args.match_original, "guidance": args.guidance, "guidance_interval": args.guidance_interval,
        "guide": str(args.guide.resolve()) if args.guide else None, "num": args.num if judge else None,
    } | model.describe() | ({} if judge is None else judge[1].describe() | {"ref_sha256": judge[0].checksum}))  # fmt: skip
    if not record.rows:  # a solution without rows may be of other settings, whose record was deleted
        (args.out / "reference.npy").unlink(missing_ok=True)
    exact = reference(args, model, seeds)
    done = {(row["solver"], row["grid"], row["nfe"]) for row in record.rows}
    for i, case in enumerate(cases, 1):
        sampler_args = argparse.Namespace(**vars(args) | case._asdict())
        sampler = make_sampler(sampler_args, model)
        if (case.solver, case.grid, sampler.nfe) in done:
            continue
        row = {"solver": case.solver, "grid": case.grid, "nfe": sampler.nfe, "steps": sampler.settings["steps"]}
        try:
            images, more = judge_case(args, model, sampler, seeds, exact, judge, case.solver)
        except NotFinite as error:  # the others are worth their while; this one has no figures, and a black picture
            say(f"fdm sweep: warning: {case.solver} ({case.grid}), {sampler.nfe} NFE: {error}")
            images, more = np.zeros(exact[:SHOWN].shape, np.uint8), dict.fromkeys(("distance", "distance_error"))
        (args.out / "parts").mkdir(exist_ok=True)
        np.save(args.out / "parts" / f"{case.solver}-{case.grid}-{sampler.nfe}.npy", images)
        record.add(row | more)
        done.add((case.solver, case.grid, sampler.nfe))
        figures = "  ".join(f"{k} {v:.4g}" for k, v in more.items() if v is not None)
        say(f"{i:>3} of {len(cases)}  {case.solver} ({case.grid}), {sampler.nfe} NFE: {figures}")
    rows = sorted(record.rows, key=lambda row: (row["solver"], row["grid"], row["nfe"]))
    write_tables(args.out, rows)
    draw(args.out, rows, exact)
    print(f"{len(rows)} rows in {args.out}/table.csv; look at distance.png and samples.png beside it.")
    return 0


class Case(NamedTuple):
    """A row of the table."""

    solver: str
    grid: str
    nfe: int


def choose_cases(args: argparse.Namespace) -> list[Case]:
    """All combinations, those without those that a solver cannot do.

    Raises:
      UserError: an unknown solver or grid, a budget that is no number, or a stochastic solver without statistics.
    """
    from fdm_jax.sampling.grids import GRIDS
    from fdm_jax.sampling.solvers import SOLVERS

    try:
        budgets = [int(part) for part in args.nfe.split(",")]
    except ValueError as error:
        raise UserError(f"--nfe must be numbers such as 5,9,17,35, and is {args.nfe!r}.") from error
    cases = []
    for solver in args.solvers.split(","):
        if solver not in SOLVERS:
            raise UserError(f"There is no solver {solver!r}: {nearest(solver, SOLVERS)}")
        known = SOLVERS[solver]
        if known.stochastic and args.ref is None:
            raise UserError(
                f"The solver {solver} draws noise, so that its distance from the ODE's solution says nothing: give --ref, "
                "or leave it out."
            )
        for grid in args.grids.split(","):
            if grid not in GRIDS:
                raise UserError(f"There is no grid {grid!r}: {nearest(grid, GRIDS)}")
            for budget in budgets:
                if known.steps_of(budget) >= known.min_steps:
                    cases.append(Case(solver, grid, budget))
    if not cases:
        raise UserError(f"None of the solvers takes so few evaluations as {args.nfe}.")
    return cases


def reference(args: argparse.Namespace, model: Loaded, seeds: np.ndarray) -> np.ndarray:
    """The ODE's solution for the seeds, float32 [N, H, W, C]; kept in the folder.

    Raises:
      UserError: the solver does not get there, or what is kept is damaged.
    """
    import jax

    from fdm_jax.devices import checked, in_batches, make_mesh, put, replicated, sharded
    from fdm_jax.host_memory import program_check
    from fdm_jax.sampling.flow import reference_samples
    from fdm_jax.sampling.grids import check_range, sampling_range
    from fdm_jax.sampling.seeds import latents

    file = args.out / "reference.npy"
    if file.exists():
        with made_again(file):
            return np.load(file)
    experiment = model.experiment
    low, high = span = (args.sigma_min, args.sigma_max)
    check_range(*span)
    if not args.match_original:
        low, high = sampling_range(experiment.family, *span)
        check_range(low, high)  # the other way about where the span lies beyond the family's
    guidance, guide, variables = load_guidance(args, model)
    model_denoiser = experiment.model_denoiser(guidance=guidance, guide=guide, exact=True)
    mesh = make_mesh()
    rows, whole = sharded(mesh), replicated(mesh)

    def solve(variables: Any, seeds: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise, tolerance = latents(seeds, experiment.image_shape), args.tolerance
        solved = reference_samples(model_denoiser(variables, labels), noise, high, low, rtol=tolerance, atol=tolerance)
        return solved.x, solved.ok

    of_batch = checked(jax.jit(solve, in_shardings=(whole, rows, rows), out_shardings=(rows, whole)), program_check())
    variables, labels, parts = put(variables, whole), experiment.choose_labels(args.label, seeds), []
    size = -(-min(args.batch, len(seeds)) // mesh.size) * mesh.size
    say(f"the ODE's solution: compiling it; then {size:,} images at a time")
    for count, batch in in_batches(size, seeds, labels):
        x, ok = jax.device_get(of_batch(variables, *put(batch, rows)))
        check_solved(bool(ok), args.tolerance)
        parts.append(x[:count])
        say(f"the ODE's solution: {sum(map(len, parts))} of {len(seeds)} images")
    solution = np.concatenate(parts)
    temporary = args.out / ".reference.part.npy"
    np.save(temporary, solution)
    temporary.replace(file)
    return solution


def judge_case(
    args: argparse.Namespace, model: Loaded, sampler: Any, seeds: np.ndarray, exact: np.ndarray,
    judge: tuple[Reference, Extractor] | None, solver: str,
) -> tuple[np.ndarray, dict[str, float | None]]:  # fmt: skip
    """The first images, and figures of a row: distance and its standard error, Frechet distance if there is a judge.

    Raises:
      NotFinite: images that are not.
    """
    from fdm_jax.devices import make_mesh
    from fdm_jax.evaluation.extractors import FeatureMaker
    from fdm_jax.evaluation.frechet import frechet_distance
    from fdm_jax.evaluation.moments import Moments
    from fdm_jax.host_memory import program_check
    from fdm_jax.sampling.generate import BatchedGenerator, check_finite
    from fdm_jax.sampling.seeds import to_uint8
    from fdm_jax.sampling.solvers import SOLVERS

    batch = min(args.batch, len(seeds))
    generator = BatchedGenerator(sampler.generate, make_mesh(), batch, quantise=False, check=program_check())

    def sample(seeds: np.ndarray) -> np.ndarray:
        labels = model.experiment.choose_labels(args.label, seeds)
        images = np.concatenate(list(generator(sampler.variables, seeds, labels)))
        check_finite(seeds, np.isfinite(images).all(axis=(1, 2, 3)))
        return images

    images = sample(seeds)
    figures: dict[str, float | None] = {"distance": None, "distance_error": None}
    if not SOLVERS[solver].stochastic:
        rms = np.sqrt(np.mean((images - exact) ** 2, axis=(1, 2, 3), dtype=np.float64))
        figures["distance"] = float(rms.mean())
        figures["distance_error"] = float(rms.std(ddof=1) / np.sqrt(len(rms))) if len(rms) > 1 else None
    if judge is not None:
        stats, extractor = judge
        maker = FeatureMaker(extractor, make_mesh(), generator.batch_size, program_check())
        counted = Moments(extractor.width)
        for start in range(0, args.num, generator.batch_size):
            more = np.arange(start, min(start + generator.batch_size, args.num), dtype=np.uint32)
            counted.add(maker(to_uint8(sample(more)))[0])
        figures["frechet"] = frechet_distance(*counted.result(), stats.mu, stats.sigma)
    return to_uint8(images[:SHOWN]), figures


def write_tables(folder: Path, rows: list[dict[str, Any]]) -> None:
    """table.csv and table.json."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    (folder / "table.csv").write_text(text.getvalue())
    (folder / "table.json").write_text(json.dumps(rows, indent=1) + "\n")


def draw(folder: Path, rows: list[dict[str, Any]], exact: np.ndarray) -> None:
    """distance.png, frechet.png if it was measured, and samples.png."""
    from fdm_jax import pictures
    from fdm_jax.sampling.seeds import to_uint8

    several_grids = len({row["grid"] for row in rows}) > 1
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {"distance": {}, "frechet": {}}
    shown = {}
    for row in rows:
        name = f"{row['solver']} ({row['grid']})" if several_grids else row["solver"]
        for figure, lines in curves.items():
            if row.get(figure) is not None:
                lines.setdefault(name, []).append((row["nfe"], row[figure]))
        part = folder / "parts" / f"{row['solver']}-{row['grid']}-{row['nfe']}.npy"
        try:
            shown[f"{name}, {row['nfe']} NFE"] = np.load(part)
        except (ValueError, EOFError, FileNotFoundError):  # the row's figures are in the record
            say(f"fdm sweep: warning: {part} is damaged or gone, and samples.png is without its row.")
    labels = {"distance": "RMS distance from the ODE's solution", "frechet": "Frechet distance"}
    for figure, lines in curves.items():
        if lines:
            series = {name: tuple(zip(*points, strict=True)) for name, points in lines.items()}
            pictures.curves_png(
                folder / f"{figure}.png", series, "function evaluations", labels[figure], logx=True, logy=True, marker="o"  # type: ignore[arg-type]
            )  # fmt: skip
    pictures.rows_png(folder / "samples.png", shown | {"the ODE's solution": to_uint8(exact[:SHOWN])})
