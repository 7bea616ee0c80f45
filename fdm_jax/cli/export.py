"""Write the averaged weights (EMA) of a run for PyTorch users, under the names of the original's SongUNet.

  fdm export --workdir=runs/cifar10 --format=safetensors --out=cifar10.safetensors
  fdm export --workdir=runs/cifar10 --format=torch --out=cifar10.pt

FILE.json beside it says how to build the network and what goes around it.  `torch` writes a plain state dict, and needs
torch; the original's SongUNet loads it with strict=True.
"""

from __future__ import annotations

import argparse

from fdm_jax.cli.places import path_argument, place_argument
from fdm_jax.cli.sampling import add_checkpoint_argument

HELP = "write a model for PyTorch users"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, type=place_argument, metavar="DIR", help="workdir of the run")
    parser.add_argument(
        "--format", choices=("safetensors", "torch"), default="safetensors", help="default: %(default)s"
    )
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="FILE", help="a new file, .safetensors or .pt"
    )
    add_checkpoint_argument(parser)


def run(args: argparse.Namespace) -> int:
    from fdm_jax.interop.files import export_model
    from fdm_jax.training.checkpoints import read_config

    read_config(args.workdir)
    description = export_model(args.workdir, args.out, args.format, args.checkpoint)
    print(
        f"{description['preconditioning']['class']} of step {description['checkpoint']:,} in {args.out}, "
        f"described in {args.out.name}.json."
    )
    return 0
