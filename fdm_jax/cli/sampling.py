"""The arguments of commands that sample: solver, grid, guidance, noise; and what is meant by them."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fdm_jax.cli.places import place_argument
from fdm_jax.errors import UserError, nearest
from fdm_jax.progress import say

if TYPE_CHECKING:
    from fdm_jax.experiment import Experiment
    from fdm_jax.sampling.generate import GenerateFn
    from fdm_jax.sampling.guidance import Guidance

EVERYWHERE = "0,inf"  # the interval of guidance that is not limited
RANGE = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "match_original": False}
CHURN = {"S_churn": 0.0, "S_min": 0.0, "S_max": float("inf"), "S_noise": 1.0}


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add them all, and ``--list-solvers``."""
    parser.add_argument("--solver", default="heun", metavar="NAME", help="see --list-solvers (default: %(default)s)")
    parser.add_argument(
        "--grid", default="edm", metavar="NAME", help="edm, log-snr, vp-uniform, vp-quadratic, or the noise levels "
        "themselves as 80,40,20,...,0 (default: %(default)s)",
    )  # fmt: skip
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="solver steps (default: the run's samples.steps)")
    length.add_argument(
        "--nfe", type=int, metavar="N", help="at most so many calls of the denoiser, instead of --steps; with guidance "
        "each is two passes",
    )  # fmt: skip
    noise = add_range_and_guidance(parser)
    noise.add_argument("--S_churn", type=float, help="0 (the default): deterministic")
    for name in ("S_min", "S_max", "S_noise"):
        noise.add_argument(f"--{name}", type=float, help="of the churn (default: %(default)s)")
    parser.set_defaults(**CHURN)


def add_range_and_guidance(parser: argparse.ArgumentParser) -> Any:
    """Those that any solver takes, and ``--list-solvers``; returns the group of the range."""
    parser.add_argument("--list-solvers", nargs=0, action=_ListSolvers, help="print a table of the solvers, and stop")
    guide = parser.add_argument_group("guidance", "towards the class, or away from a worse model")
    guide.add_argument("--guidance", type=float, metavar="SCALE", help="1: none; more: closer to the class")
    guide.add_argument(
        "--guidance-interval", default=EVERYWHERE, metavar="LOW,HIGH", help="noise levels where it acts (default: all)"
    )
    guide.add_argument(
        "--guide",
        type=place_argument,
        metavar="DIR",
        help="workdir of the worse model, such as an early checkpoint of a smaller one",
    )
    noise = parser.add_argument_group("noise", "range of the grid, which the model's own range bounds; and churn")
    noise.add_argument("--sigma-min", type=float, help="default: %(default)s")
    noise.add_argument("--sigma-max", type=float, help="default: %(default)s")
    noise.add_argument("--rho", type=float, help="of the grid edm (default: %(default)s)")
    noise.add_argument(
        "--match-original",
        action="store_true",
        help="do not bound the range by the model's own: the original's DPM run",
    )
    parser.set_defaults(**RANGE)
    return noise


class _ListSolvers(argparse.Action):
    """Prints the table and ends the program, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from fdm_jax.sampling.solvers import SOLVERS

        rows = [("name", "order", "NFE", "noise", "least steps", "source")]
        for name, solver in SOLVERS.items():
            noise = "yes" if solver.stochastic else "no"
            rows.append((name, str(solver.order), solver.cost, noise, str(solver.min_steps), solver.source))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        parser.exit()


def parse_grid(text: str) -> str | list[float]:
    """A name, or "80,40,0" -> [80.0, 40.0, 0.0].

    Raises:
      UserError: a list that holds something else than numbers, or no 0 at its end.
    """
    if "," not in text:
        return text
    try:
        levels = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--grid {text!r} holds something else than numbers: write the levels as 80,40,20,0."
        ) from error
    if levels[-1] != 0:
        raise UserError(f"--grid {text!r} must end at 0.")
    return levels


def check_noise(args: argparse.Namespace) -> None:
    """Refuse arguments of the noise that would change nothing.

    Raises:
      UserError: naming the first.
    """
    for names, without, reason in (
        (RANGE, "," not in args.grid, f"--grid={args.grid} gives the noise levels themselves"),
        (("rho",), args.grid == "edm", f"it belongs to the grid edm, and this one is {args.grid}"),
        (("S_min", "S_max", "S_noise"), args.S_churn, "there is no churn: give --S_churn=40, say"),
    ):
        for name in names:
            if not without and getattr(args, name) != (RANGE | CHURN)[name]:
                option = name if name in CHURN else name.replace("_", "-")
                raise UserError(f"--{option} would change nothing, because {reason}.")


def parse_guidance(args: argparse.Namespace) -> Guidance | None:
    """What --guidance, --guidance-interval and --guide ask for.

    Raises:
      UserError: an interval that is none, or a guide or an interval without a scale.
    """
    from fdm_jax.sampling.guidance import Guidance

    if args.guidance is None:
        for name, given in (("guide", args.guide), ("guidance-interval", args.guidance_interval != EVERYWHERE)):
            if given:
                raise UserError(f"--{name} needs a scale: give --guidance=2, say.")
        return None
    try:
        low, high = map(float, args.guidance_interval.split(","))
    except ValueError as error:
        raise UserError(
            f"--guidance-interval must be two noise levels LOW,HIGH, and is {args.guidance_interval!r}."
        ) from error
    return Guidance(scale=args.guidance, lowest=low, highest=high)


def choose_steps(args: argparse.Namespace, default: int, grid: str | list[float]) -> int:
    """The steps that --steps, --nfe or a list of levels ask for.

    Raises:
      UserError: an unknown solver.
    """
    from fdm_jax.sampling.solvers import SOLVERS

    if args.solver not in SOLVERS:
        raise UserError(f"There is no solver {args.solver!r}: {nearest(args.solver, SOLVERS)}")
    if args.nfe is not None:
        return SOLVERS[args.solver].steps_of(args.nfe)
    if args.steps is not None:
        return args.steps
    return default if isinstance(grid, str) else len(grid) - 1


def check_tolerance(tolerance: float) -> None:
    """Raise a UserError unless an adaptive solver can do with it."""
    if not 1e-12 < tolerance < 0.1:
        raise UserError(f"--tolerance must be between 1e-12 and 0.1, and is {tolerance}.")


def check_solved(ok: bool, tolerance: float) -> None:
    """Raise a UserError unless an adaptive solver got there."""
    if not ok:
        raise UserError(
            f"The ODE could not be solved with a tolerance of {tolerance}: give a larger --tolerance, or an earlier "
            "--checkpoint if the weights of this one are not finite numbers."
        )


class Loaded(NamedTuple):
    """A checkpoint's model, and the one that guides it, if there is one."""

    checkpoint: int
    experiment: Experiment
    variables: Mapping[str, Any]
    guide: Loaded | None = None

    def describe(self) -> dict[str, Any]:
        """What a result has to say of it.  Another run in the same workdir comes to the same steps with other weights."""
        import jax

        # The same weights denoise otherwise in another family, or without momentum.
        digest = hashlib.sha256(repr(self.experiment.family).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.variables):
            digest.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        own = {"checkpoint": self.checkpoint, "model_sha256": digest.hexdigest()}
        return own | ({f"guide_{name}": value for name, value in self.guide.describe().items()} if self.guide else {})


def add_class_argument(parser: argparse.ArgumentParser, text: str = "this class for all (default: by seed)") -> None:
    """--class, a number or a name, as ``args.label``."""
    parser.add_argument("--class", dest="label", type=_class, metavar="CLASS", help=f"number or name: {text}")


def _class(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """--checkpoint."""
    parser.add_argument(
        "--checkpoint", type=_checkpoint, metavar="STEP", help="optimiser step, or best of those that the run evaluated "
        "(default: the newest)",
    )  # fmt: skip


def _checkpoint(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an optimiser step, or best, and is {text!r}.")
    return text if text == "best" else int(text)


def load_model(workdir: Path, step: int | str | None = None) -> Loaded:
    """The averaged weights of a workdir, from the newest checkpoint by default; "best" stands for the best one.

    Raises:
      UserError: it is no workdir, or there is no such checkpoint.
    """
    from fdm_jax.model import load_run

    model = load_run(workdir, step)
    assert model.checkpoint is not None
    return Loaded(model.checkpoint, model.experiment, model.variables)


def load_with_guide(args: argparse.Namespace) -> Loaded:
    """The model that the arguments name, with the newest checkpoint of its guide if they name one.

    Raises:
      UserError: see :func:`load_model` and :func:`parse_guidance`.
    """
    parse_guidance(args)  # a mistake there is said before anything is read
    model = load_model(args.workdir, args.checkpoint)
    return model if args.guide is None else model._replace(guide=load_model(args.guide))


def load_guidance(args: argparse.Namespace, model: Loaded) -> tuple[Guidance | None, Any, Any]:
    """The guidance asked for, network and family of the guide if there is one, and the variables of all that runs.

    Says on stderr if the model was not trained for it.

    Raises:
      UserError: see :func:`parse_guidance`; a guide for other images or classes.
    """
    guidance, experiment = parse_guidance(args), model.experiment
    if model.guide is not None:
        other = model.guide.experiment
        if (other.image_shape, other.num_classes) != (experiment.image_shape, experiment.num_classes):
            raise UserError(
                f"The guide {args.guide} makes images of {other.image_shape} with {other.num_classes} classes, and the "
                f"model of {experiment.image_shape} with {experiment.num_classes}: they must be alike."
            )
        return guidance, (other.network, other.family), (model.variables, model.guide.variables)
    if guidance is not None and experiment.num_classes and not experiment.network.label_dropout:
        say(
            f"fdm {args.command}: warning: the model was trained without label dropout (network.label_dropout is 0), so "
            "it has never seen an image without its class: guidance away from that may not mean much."
        )
    return guidance, None, model.variables


class Sampler(NamedTuple):
    """What the arguments ask for.

    Attributes:
      generate: (variables, seeds, labels) -> images [B, H, W, C], about [-1, 1].
      variables: of the model, or of it and its guide.
      nfe: calls of the denoiser per image; where it is guided, each is two passes.
      settings: what the images depend on beside seed and class.
    """

    generate: GenerateFn
    variables: Any
    nfe: int
    settings: dict[str, Any]


def make_sampler(args: argparse.Namespace, model: Loaded) -> Sampler:
    """Build it; nothing is compiled.

    Raises:
      UserError: what is asked for does not exist or does not fit.
    """
    from fdm_jax.sampling import Churn
    from fdm_jax.sampling.grids import edm_sigmas
    from fdm_jax.sampling.solvers import make_calls

    experiment, grid = model.experiment, parse_grid(args.grid)
    steps = choose_steps(args, experiment.config.samples.steps, grid)
    guidance, guide, variables = load_guidance(args, model)
    generate = experiment.generate_fn(
        steps=steps, solver=args.solver, grid=grid, clip=not args.match_original,
        churn=Churn(S_churn=args.S_churn, S_min=args.S_min, S_max=args.S_max, S_noise=args.S_noise),
        guidance=guidance, guide=guide, sigma_min=args.sigma_min, sigma_max=args.sigma_max, rho=args.rho,
    )  # fmt: skip
    settings = {
        "workdir": str(args.workdir.resolve()), "class": args.label, "steps": steps,
        "solver": args.solver, "grid": args.grid, "match_original": args.match_original,
        "sigma_min": args.sigma_min, "sigma_max": args.sigma_max, "rho": args.rho, "S_churn": args.S_churn,
        "S_min": args.S_min, "S_max": str(args.S_max), "S_noise": args.S_noise, "guidance": args.guidance,
        "guidance_interval": args.guidance_interval, "guide": str(args.guide.resolve()) if args.guide else None,
    } | model.describe()  # fmt: skip
    return Sampler(generate, variables, len(make_calls(args.solver, steps, edm_sigmas)), settings)
