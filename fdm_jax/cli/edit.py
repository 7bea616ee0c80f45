"""Edit images with a trained model, and look at what it makes of them.

  fdm edit inpaint     --workdir=runs/cats --image=cat.png --mask=mask.png --out=cats.png    make what is white in the mask
  fdm edit vary        --workdir=runs/cats --image=cat.png --strength=0.6 --out=cats.png     noise it, and come back
  fdm edit colorise    --workdir=runs/cats --image=grey.png --out=cats.png                   keep the luma, make the colours
  fdm edit encode      --workdir=runs/cats --image=cat.png --out=cats.png                    to its latent and back
  fdm edit interpolate --workdir=runs/cats --seeds=3,7 --frames=10 --out=cats.png            from one seed to another

The picture begins with the image as it was given; then comes one result for each seed (or frame).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fdm_jax.cli.checks import need_positive
from fdm_jax.cli.generate import parse_seeds
from fdm_jax.cli.places import check_out, path_argument, place_argument
from fdm_jax.cli.sampling import (
    Loaded,
    add_checkpoint_argument,
    add_class_argument,
    add_sampling_arguments,
    check_noise,
    choose_steps,
    load_guidance,
    load_with_guide,
    parse_grid,
)
from fdm_jax.errors import UserError

if TYPE_CHECKING:
    import jax

    from fdm_jax.sampling.generate import GenerateFn

HELP = "inpaint, vary, colorise, encode or interpolate images"
DEFAULTS = {"strength": 0.6, "frames": 10}
MOST = 1000  # results in a row
ACTIONS = ("inpaint", "vary", "colorise", "encode", "interpolate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("--workdir", required=True, type=place_argument, metavar="DIR", help="workdir of the run")
    parser.add_argument("--out", required=True, type=path_argument, metavar="FILE.png", help="the picture")
    parser.add_argument("--image", type=path_argument, metavar="FILE", help="of the model's size (not for interpolate)")
    parser.add_argument(
        "--mask", type=path_argument, metavar="FILE", help="for inpaint: white where pixels are to be made"
    )
    parser.add_argument(
        "--resample", type=int, default=1, metavar="N", help="for inpaint: go over each step N times (default: 1)"
    )
    parser.add_argument("--strength", type=float, help="for vary: share of the steps (default: %(default)s)")
    parser.add_argument("--frames", type=int, metavar="N", help="for interpolate (default: %(default)s)")
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time (default: %(default)s)")
    parser.add_argument("--seeds", default="0-7", help="such as 0-7 or 3,7 (default: %(default)s)")
    add_class_argument(parser, "of the results (default: by seed, in interpolate by the first)")
    add_checkpoint_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import jax

    from fdm_jax import pictures
    from fdm_jax.devices import make_mesh
    from fdm_jax.host_memory import program_check
    from fdm_jax.sampling.generate import BatchedGenerator
    from fdm_jax.sampling.seeds import to_uint8

    _check(args)
    seeds = parse_seeds(args.seeds)
    if args.action == "interpolate" and len(seeds) != 2:
        raise UserError(f"Interpolation goes from one seed to another: give two, not {len(seeds)}.")
    count = args.frames if args.action == "interpolate" else len(seeds)
    if count > MOST:
        raise UserError(f"A picture has room for {MOST} results, and {count:,} are asked for: make several pictures.")
    model = load_with_guide(args)
    experiment, shape = model.experiment, model.experiment.image_shape
    known = read_image(args.image, shape, args.action == "colorise") if args.image else None
    mask = (read_image(args.mask, (*shape[:2], 1), False) > 0).astype(np.float32) if args.mask else None
    generate, variables = make_edit(args, model, seeds, known, mask)
    labels = experiment.choose_labels(args.label, seeds)
    if args.action == "interpolate":  # a frame takes the place of a seed
        seeds, labels = np.arange(count), np.repeat(labels[:1], count)
    mesh = make_mesh(jax.local_devices())
    generator = BatchedGenerator(generate, mesh, min(args.batch, count), check=program_check())
    results = np.concatenate(list(generator(variables, seeds, labels)))
    if known is not None:
        first = np.broadcast_to(to_uint8(known), results.shape[1:])
        if mask is not None:  # what is to be made is shown grey
            first = np.where(mask > 0, 128, first).astype(np.uint8)
        results = np.concatenate([first[None], results])
    pictures.save_png(pictures.image_grid(results, len(results), scale=max(1, 64 // shape[0])), args.out)
    print(f"{args.action}: {count} images in {args.out} (checkpoint of step {model.checkpoint:,}).")
    return 0


def make_edit(
    args: argparse.Namespace, model: Loaded, ends: np.ndarray, known: Any, mask: Any
) -> tuple[GenerateFn, Any]:
    """What is asked for, as a function like :func:`~fdm_jax.sampling.generate.make_generate_fn`'s; and its variables.

    Of ``interpolate`` it takes numbers of frames instead of seeds, and goes from the first of the two ``ends`` to the
    second.  ``known`` is the given image, float32 [H, W, C], and ``mask`` is [H, W, 1]; None where an action has none.

    Raises:
      UserError: what is asked for does not exist or does not fit.
    """
    import jax.numpy as jnp

    from fdm_jax.sampling import Churn, editing
    from fdm_jax.sampling.generate import levels_of
    from fdm_jax.sampling.linear import integrate
    from fdm_jax.sampling.seeds import churn_noise, latents
    from fdm_jax.sampling.solvers import SOLVERS, make_calls

    experiment, shape, action = model.experiment, model.experiment.image_shape, args.action
    grid = parse_grid(args.grid)
    steps = choose_steps(args, experiment.config.samples.steps, grid)
    levels = levels_of(
        grid, experiment.family, args.sigma_min, args.sigma_max, args.rho, clip=not args.match_original
    )  # fmt: skip
    points = SOLVERS[args.solver].points(steps)
    sigmas = whole = levels(points)
    if action == "vary":
        assert known is not None
        if points != steps:
            raise UserError(f"vary takes a solver with a step for each level of its grid, not {args.solver}.")
        _, sigmas = editing.start_from(known, known, whole, args.strength)
    if args.resample > 1:
        if args.solver not in ("heun", "euler") or args.S_churn:
            raise UserError(
                f"Resampling belongs to the solvers heun and euler, not to {args.solver}{' with churn' * bool(args.S_churn)}."
            )
        calls = editing.resampling_calls(sigmas, args.resample, heun=args.solver == "heun")
    else:
        churn = Churn(S_churn=args.S_churn, S_min=args.S_min, S_max=args.S_max, S_noise=args.S_noise)
        calls = make_calls(args.solver, len(sigmas) - 1 if action == "vary" else steps, sigmas.tolist(), churn)
    guidance, guide, variables = load_guidance(args, model)
    model_denoiser = experiment.model_denoiser(guidance=guidance, guide=guide)

    def generate(variables: Any, seeds: jax.Array, labels: jax.Array) -> jax.Array:
        denoise_fn = model_denoiser(variables, labels)
        if action == "interpolate":
            t = (seeds / (args.frames - 1))[:, None, None, None]
            first, second = latents(jnp.asarray(ends), shape)
            start, seeds = editing.interpolate(first, second, t), jnp.full(seeds.shape, ends[0])
        else:
            start = latents(seeds, shape)
        if known is not None:
            images = jnp.broadcast_to(known, (len(seeds), *known.shape))
            if mask is not None:
                denoise_fn = editing.inpaint(denoise_fn, images, mask)
            elif action == "colorise":
                denoise_fn = editing.colorise(denoise_fn, images)
            elif action == "encode":
                start = editing.encode(denoise_fn, images, sigmas)
            else:
                start, _ = editing.start_from(images, start, whole, args.strength)
        return integrate(denoise_fn, start, sigmas[0], calls, lambda i: churn_noise(seeds, i, shape))

    return generate, variables


def _check(args: argparse.Namespace) -> None:
    check_out(args.out, ".png")
    need_positive(args, "batch", "steps", "nfe", "resample")
    check_noise(args)
    for name, action in (("strength", "vary"), ("frames", "interpolate")):
        if args.action != action and getattr(args, name) != DEFAULTS[name]:
            raise UserError(f"--{name} is for {action}, not for {args.action}.")
    if args.frames < 2:
        raise UserError(f"--frames must be 2 or more, and is {args.frames}.")
    if (args.image is None) != (args.action == "interpolate"):
        raise UserError("--image is not for interpolate." if args.image else f"{args.action} needs an --image.")
    if args.resample > 1 and args.action != "inpaint":
        raise UserError(f"--resample is for inpaint, not for {args.action}.")
    if (args.mask is None) == (args.action == "inpaint"):
        raise UserError(
            "inpaint needs a --mask." if args.mask is None else f"--mask is for inpaint, not for {args.action}."
        )


def read_image(path: Path, shape: tuple[int, ...], grey: bool) -> np.ndarray:
    """A picture of the model's size, float32 [H, W, C] in [-1, 1].

    Raises:
      UserError: it cannot be read, or has another size, or colours come from a model that makes none.
    """
    from fdm_jax.data.images import ImageShape, decode_picture

    if grey and shape[-1] != 3:
        raise UserError("Colorisation needs a model of RGB images, and this one makes grey ones.")
    try:
        image = decode_picture(path.read_bytes(), str(path), 1 if grey else shape[-1])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if image.shape[:2] != tuple(shape[:2]):
        raise UserError(
            f"{path} is {ImageShape(*image.shape)}, and the model makes {shape[1]}x{shape[0]}: scale or crop it."
        )
    return image.astype(np.float32) / 127.5 - 1
