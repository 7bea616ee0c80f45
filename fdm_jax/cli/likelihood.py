"""Likelihood of images under a trained model, in bits per dimension.

  fdm likelihood --workdir=runs/digits                          of the test images of its data set
  fdm likelihood --workdir=runs/digits --exact                  with the trace itself (images of a few hundred values)
  fdm likelihood --workdir=runs/cats --data=cats.zip --split=train --num=1000

The probability-flow ODE is followed from each image to noise by an adaptive solver of order 8, in float32; the change of
volume on the way is Hutchinson's estimate with random signs, or exact.  8-bit values are spread uniformly over their bins
(uniform dequantisation), so that the figure is an upper bound, comparable to other models' on 8-bit images.  Results
are kept image by image in a file of JSON lines; a command that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from fdm_jax.cli.checks import need_positive
from fdm_jax.cli.places import path_argument, place_argument
from fdm_jax.cli.sampling import add_checkpoint_argument, check_solved, check_tolerance
from fdm_jax.errors import UserError
from fdm_jax.whole_files import resolved

HELP = "measure bits per dimension of images under a model"

EXACT_UP_TO = 1024  # values of an image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=place_argument, metavar="DIR", help="workdir of the run")
    parser.add_argument("--data", metavar="NAME", help="a data set's name or path (default: the run's own)")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--num", type=int, metavar="N", help="the first so many images (default: all)")
    parser.add_argument("--draws", type=int, default=1, metavar="N", help="per image, averaged (default: %(default)s)")
    parser.add_argument("--exact", action="store_true", help=f"the trace itself, up to {EXACT_UP_TO} values an image")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="of the ODE solver (default: %(default)s)")
    parser.add_argument("--sigma-min", type=float, default=0.002, help="where images are (default: %(default)s)")
    parser.add_argument("--sigma-max", type=float, default=80.0, help="where noise is (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="the file of results (default: likelihood-SPLIT.jsonl or likelihood-SPLIT-exact.jsonl in the workdir)",
    )


def run(args: argparse.Namespace) -> int:
    need_positive(args, "batch", "num", "draws")
    check_tolerance(args.tolerance)
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed must be from 0 to 2^31 - 1, and is {args.seed}.")

    from fdm_jax.cli.record import Record
    from fdm_jax.cli.sampling import load_model
    from fdm_jax.devices import in_batches, make_mesh
    from fdm_jax.experiment import open_data
    from fdm_jax.progress import Progress
    from fdm_jax.sampling.grids import check_range, sampling_range

    model = load_model(args.workdir, args.checkpoint)
    experiment, shape = model.experiment, model.experiment.image_shape
    check_range(args.sigma_min, args.sigma_max)
    span = sampling_range(experiment.family, args.sigma_min, args.sigma_max)
    check_range(*span)
    if args.exact and int(np.prod(shape)) > EXACT_UP_TO:
        raise UserError(
            f"--exact takes images of up to {EXACT_UP_TO} values, and these have {int(np.prod(shape))}: leave it out."
        )
    try:
        source = open_data(experiment.config, args.split, args.data)
    except UserError as refused:
        if args.data is not None:
            raise
        own = experiment.config.data.source
        raise UserError(
            f"The run's own images (data.source={own}) cannot be had: {refused} Others are given with --data and --split."
        ) from refused
    spec = source.spec
    if (spec.resolution, spec.resolution, spec.channels) != shape:
        raise UserError(
            f"The model makes {shape[0]}x{shape[1]}x{shape[2]}, and {spec.name} has images of "
            f"{spec.resolution}x{spec.resolution}x{spec.channels}."
        )
    if spec.num_classes > experiment.num_classes:  # labels that it does not know would count as none
        raise UserError(f"The model knows {experiment.num_classes} classes, and {spec.name} has {spec.num_classes}.")
    num = min(args.num or len(source), len(source))
    name = args.split.replace("/", "-") + "-exact" * args.exact
    out = args.out or args.workdir / f"likelihood-{name}.jsonl"
    record = Record(out, {
        "workdir": str(resolved(args.workdir)), "data": spec.name, "source": args.data, "split": args.split,
        "draws": args.draws, "exact": args.exact, "tolerance": args.tolerance, "sigma_min": span[0],
        "sigma_max": span[1], "seed": args.seed, "dequantisation": "uniform",
    } | model.describe())  # fmt: skip
    missing = np.setdiff1d(np.arange(num), [row["index"] for row in record.rows])
    if len(missing):
        mesh = make_mesh()
        bits = compile_bits(experiment, span, args, mesh)
        done = num - len(missing)
        progress = Progress(num, done)
        size = -(-min(args.batch, len(missing)) // mesh.size) * mesh.size
        progress.say(f"Compiling the ODE; then {len(missing):,} images, {size:,} at a time, which end together.")
        for count, (indices,) in in_batches(size, missing):
            values, steps = bits(model.variables, source.read(indices), indices)
            record.add(*(
                {"index": int(i), "bits_per_dim": float(value), "ode_steps": int(steps)}
                for i, value in zip(indices[:count], values[:count], strict=True)
            ))  # fmt: skip
            done += count
            progress.count(done)
        progress.close()
    # By index: of two commands at once, each may have written an image's row.
    values = np.array(list({row["index"]: row["bits_per_dim"] for row in record.rows if row["index"] < num}.values()))
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    print(
        f"{values.mean():.4f} +- {error:.4f} bits per dimension: {len(values):,} images of {spec.name} ({args.split}), "
        f"uniform dequantisation, {'exact trace' if args.exact else 'Hutchinson'}, checkpoint of step "
        f"{model.checkpoint:,}; each image in {out}."
    )
    return 0


def compile_bits(experiment: Any, span: tuple[float, float], args: argparse.Namespace, mesh: Any) -> Any:
    """bits(variables, batch, indices) -> (bits per dimension [B], ODE steps); the draws depend on seed and index alone."""
    import jax

    from fdm_jax.devices import checked, put, replicated, sharded
    from fdm_jax.host_memory import program_check
    from fdm_jax.sampling.flow import bits_per_dim, exact_trace, hutchinson, log_likelihood
    from fdm_jax.sampling.seeds import dequantise, signs

    shape = experiment.image_shape
    model_denoiser = experiment.model_denoiser(exact=True)

    def bits(variables: Any, image: jax.Array, label: jax.Array, seeds: jax.Array) -> tuple[jax.Array, ...]:
        solved = log_likelihood(
            model_denoiser(variables, label), dequantise(image, seeds), *span,
            exact_trace if args.exact else hutchinson(signs(seeds, shape)), rtol=args.tolerance, atol=args.tolerance,
        )  # fmt: skip
        return bits_per_dim(solved.x, int(np.prod(shape))), solved.steps, solved.ok

    rows, whole = sharded(mesh), replicated(mesh)
    jitted = jax.jit(bits, in_shardings=(whole, rows, rows, rows), out_shardings=(rows, whole, whole))
    measured = checked(jitted, program_check())

    def measure(variables: Any, batch: Any, indices: np.ndarray) -> tuple[np.ndarray, int]:
        variables = put(variables, whole)
        total, steps = np.zeros(len(indices)), 0
        for draw in range(args.draws):
            seeds = np.random.SeedSequence([args.seed, draw]).generate_state(1)[0] + indices.astype(np.uint32)
            placed = put((batch["image"], batch["label"], seeds), rows)
            values, tried, ok = jax.device_get(measured(variables, *placed))
            check_solved(bool(ok), args.tolerance)
            total, steps = total + values.astype(np.float64), steps + int(tried)
        return total / args.draws, steps

    return measure
