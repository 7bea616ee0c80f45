"""Train a model, or go on training it: the same command again continues the run from its newest checkpoint.

  fdm train --config=configs/edm.py:digits --workdir=runs/digits
  fdm train --config=configs/edm.py:cifar10 --workdir=runs/cifar10 --config.data.source=my-images.zip

The workdir receives checkpoints, metrics.jsonl, TensorBoard files, grids of samples and the configuration.
Ctrl-C, SIGTERM and a terminal that closes (unless nohup is before the command) save before they end the run.

Several processes, of one machine or many, give the same command with --distributed; the workdir is one that all of them
see.  SIGTERM to one of them saves in all at the same step, and ends them with exit code 75: "start me again".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fdm_jax.cli.distributed import add_distributed_argument, joined
from fdm_jax.cli.places import place_argument
from fdm_jax.errors import UserError
from fdm_jax.progress import say

if TYPE_CHECKING:
    from fdm_jax.data.sources import Source
    from fdm_jax.experiment import Experiment

HELP = "train a model, or go on with a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.cli.config import add_config_argument

    add_config_argument(parser)
    add_distributed_argument(parser)
    parser.add_argument(
        "--workdir", required=True, type=place_argument, metavar="DIR", help="where everything of the run is kept"
    )
    parser.add_argument(
        "--init_from",
        "--init-from",
        type=place_argument,
        metavar="DIR",
        help="start from the averaged weights in another workdir",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check configuration, data and devices, print them, and stop there"
    )


def run(args: argparse.Namespace) -> int:
    import jax

    from fdm_jax.cli.config import load
    from fdm_jax.defaults import to_json
    from fdm_jax.experiment import Experiment, open_data
    from fdm_jax.training.agreement import all_or_none
    from fdm_jax.training.loop import check, train

    if args.init_from:
        args.overrides.append(f"--config.init_from={args.init_from}")
    config = load(args)
    if config.eval.ref and not config.eval.every_images:
        raise UserError(
            "eval.ref is given, but with eval.every_images=0 nothing is measured: give --config.eval.every_images=2500000, "
            "say, or leave eval.ref out."
        )
    with joined(args.distributed, args.workdir):
        with all_or_none("Another process cannot train on its data, and says why."):
            source = open_data(config)
            experiment = Experiment.from_config(config, source.spec)
        if jax.process_index() == 0:
            processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
            kind = jax.devices()[0].device_kind
            print(f"Data: {source.spec}. Devices: {jax.device_count()} x {kind}{processes}.", flush=True)
            for sentence in doubts(experiment, source):
                say(f"fdm train: warning: {sentence}")
        if args.dry_run:
            check(experiment)
            if jax.process_index() == 0:
                print(to_json(config), end="")
            return 0
        train(experiment, source, args.workdir)
    return 0


def doubts(experiment: Experiment, source: Source) -> Iterator[str]:
    """What a run may well be meant to be, and probably is not."""
    classes, resolutions = source.spec.num_classes, experiment.network.resolutions
    if experiment.num_classes > classes:
        yield (
            f"the network is for {experiment.num_classes} classes and the data have {classes}: of the others it learns "
            f"nothing, and samples of them will be of no use. To leave them out, set --config.data.num_classes={classes}."
        )
    for resolution in dict.fromkeys(experiment.network.attn_resolutions):
        if resolution not in resolutions:
            yield (
                f"network.attn_resolutions names {resolution}, and the network's resolutions are {resolutions}: that gives "
                f"it no attention. To have it at {resolutions[-1]}, say, set "
                f'--config.network.attn_resolutions="({resolutions[-1]},)".'
            )
