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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.cli.generate import parse_seeds
from fdm_jax.cli.places import path_argument, place_argument
from fdm_jax.cli.sampling import (
    add_checkpoint_argument,
    add_sampling_arguments,
    choose_labels,
    choose_steps,
    load_guidance,
    load_with_guide,
    parse_grid,
)
from fdm_jax.errors import UserError

HELP = "inpaint, vary, colorise, encode or interpolate images"
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
    parser.add_argument(
        "--strength", type=float, default=0.6, help="for vary: share of the steps (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=10, metavar="N", help="for interpolate (default: %(default)s)")
    parser.add_argument("--seeds", default="0-7", help="such as 0-7 or 3,7 (default: %(default)s)")
    parser.add_argument(
        "--class",
        dest="label",
        type=int,
        metavar="N",
        help="of the results (default: by seed, in interpolate by the first)",
    )
    add_checkpoint_argument(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import jax
    import jax.numpy as jnp
    from absl import logging

    from fdm_jax import pictures
    from fdm_jax.sampling import Churn, editing
    from fdm_jax.sampling.generate import levels_of, make_model_denoiser
    from fdm_jax.sampling.linear import integrate
    from fdm_jax.sampling.seeds import churn_noise, latents, to_uint8
    from fdm_jax.sampling.solvers import SOLVERS, make_calls

    _check(args)
    logging.set_verbosity(logging.ERROR)  # Orbax warns that what is only read will not be written
    seeds = parse_seeds(args.seeds)
    model = load_with_guide(args)
    experiment, shape = model.experiment, model.experiment.image_shape
    known = read_image(args.image, shape, args.action == "colorise") if args.image else None
    grid = parse_grid(args.grid)
    steps = choose_steps(args, experiment.config.samples.steps, grid)
    levels = levels_of(
        grid, experiment.family, args.sigma_min, args.sigma_max, args.rho, clip=not args.match_original
    )  # fmt: skip
    sigmas = levels(SOLVERS[args.solver].points(steps))
    churn = Churn(S_churn=args.S_churn, S_min=args.S_min, S_max=args.S_max, S_noise=args.S_noise)
    noise = latents(jnp.asarray(seeds), shape)
    if args.action == "interpolate":
        if len(seeds) != 2:
            raise UserError(f"Interpolation goes from one seed to another: give two, not {len(seeds)}.")
        t = jnp.linspace(0, 1, args.frames)[:, None, None, None]
        noise = editing.interpolate(noise[:1], noise[1:], t)
        seeds = np.full(args.frames, seeds[0])
    labels = choose_labels(args.label, seeds, experiment.num_classes)
    guidance, guide, variables = load_guidance(args, model)
    model_denoiser = make_model_denoiser(
        experiment.network, experiment.family, experiment.num_classes, guidance, guide
    )  # fmt: skip
    images: Any = None if known is None else jnp.broadcast_to(known, (len(seeds), *known.shape))
    if args.action == "vary":
        if SOLVERS[args.solver].points(steps) != steps:
            raise UserError(f"vary takes a solver with a step for each level of its grid, not {args.solver}.")
        noise, sigmas = editing.start_from(images, noise, sigmas, args.strength)
        steps = len(sigmas) - 1
    if args.resample > 1:
        if args.solver not in ("heun", "euler") or args.S_churn:
            raise UserError(
                f"Resampling belongs to the solvers heun and euler, not to {args.solver}{' with churn' * bool(args.S_churn)}."
            )
        calls = editing.resampling_calls(sigmas, args.resample, heun=args.solver == "heun")
    else:
        calls = make_calls(args.solver, steps, sigmas.tolist(), churn)
    mask = None
    if args.action == "inpaint":
        mask = (read_image(args.mask, (*shape[:2], 1), False) > 0).astype(jnp.float32)

    def sample(variables: Any, start: jax.Array, labels: jax.Array) -> jax.Array:
        denoise_fn: Any = model_denoiser(variables, labels)
        if mask is not None:
            denoise_fn = editing.inpaint(denoise_fn, images, mask)
        elif args.action == "colorise":
            denoise_fn = editing.colorise(denoise_fn, images)
        elif args.action == "encode":
            start = editing.encode(denoise_fn, images, sigmas)
        draw: Callable[[jax.Array], jax.Array] = lambda i: churn_noise(jnp.asarray(seeds), i, shape)  # noqa: E731
        return to_uint8(integrate(denoise_fn, start, sigmas[0], calls, draw))

    results = np.asarray(jax.jit(sample)(variables, noise, jnp.asarray(labels)))
    if known is not None:
        first = np.broadcast_to(np.asarray(to_uint8(known)), results.shape[1:])
        if mask is not None:  # what is to be made is shown grey
            first = np.where(np.asarray(mask) > 0, 128, first).astype(np.uint8)
        results = np.concatenate([first[None], results])
    scale = max(1, 64 // shape[0])
    pictures.save_png(pictures.image_grid(results, len(results), scale=scale), args.out)
    print(
        f"{args.action}: {len(results) - (known is not None)} images in {args.out} (checkpoint of step {model.checkpoint:,})."
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.out.suffix != ".png":
        raise UserError(f"--out must end in .png, and is {args.out}.")
    if args.frames < 2:
        raise UserError(f"--frames must be 2 or more, and is {args.frames}.")
    if (args.image is None) != (args.action == "interpolate"):
        raise UserError("--image is not for interpolate." if args.image else f"{args.action} needs an --image.")
    if args.resample < 1 or (args.resample > 1 and args.action != "inpaint"):
        raise UserError(
            f"--resample must be 1 or more, and is {args.resample}."
            if args.resample < 1
            else f"--resample is for inpaint, not for {args.action}."
        )
    if (args.mask is None) == (args.action == "inpaint"):
        raise UserError(
            "inpaint needs a --mask." if args.mask is None else f"--mask is for inpaint, not for {args.action}."
        )


def read_image(path: Path, shape: tuple[int, ...], grey: bool) -> Any:
    """A picture of the model's size, float32 [H, W, C] in [-1, 1].

    Raises:
      UserError: it cannot be read, or has another size, or colours come from a model that makes none.
    """
    import jax.numpy as jnp

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
    return jnp.asarray(image, jnp.float32) / 127.5 - 1
