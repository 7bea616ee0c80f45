"""Turn a model file into a workdir that generates like one trained here.

  fdm import network-snapshot-200000.pkl --workdir=runs/authors      a snapshot of FDM or EDM
  fdm import model.safetensors --workdir=runs/copy                   what `fdm export` wrote

Snapshots are pickles that carry programs: none of them is run.  Reading one needs torch for the numbers in it.
A new run starts from an import with `fdm train --init_from=DIR`.
"""

from __future__ import annotations

import argparse

from fdm_jax.cli.places import path_argument, place_argument

HELP = "turn a PyTorch snapshot, or an export, into a workdir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=path_argument, metavar="FILE", help="network-snapshot-*.pkl, *.safetensors or *.pt"
    )
    parser.add_argument("--workdir", required=True, type=place_argument, metavar="DIR", help="a new workdir")


def run(args: argparse.Namespace) -> int:
    import jax

    from fdm_jax.interop.files import import_model

    model = import_model(args.file, args.workdir)
    family, network = model.config["family"]["name"].upper(), model.network
    momentum = model.family.momentum
    kind = f"{family}-FDM with multiplier {momentum.multiplier:g}" if momentum else family
    count = sum(leaf.size for leaf in jax.tree.leaves(model.variables["params"]))
    labels = f"{network.label_dim} classes" if network.label_dim else "no classes"
    print(
        f"{kind} on {network.preset}, {count:,} parameters, "
        f"{network.resolution}x{network.resolution}x{network.channels} images, {labels}: in {args.workdir}."
    )
    return 0
