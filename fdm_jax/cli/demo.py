"""Train on handwritten digits in a minute or two, draw ten of each class, and have a classifier read them.

  fdm demo --workdir=demo_run

Leaves a run like any other in the workdir, the picture digits.png, and prints one figure: the share of 500
generated digits that a classifier trained on real ones reads as the class asked for, beside the share of
held-out real digits that it reads right.  Giving the command again goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fdm_jax.cli.places import place_argument

HELP = "train on small digits, draw some, and measure how readable they are"
PER_CLASS, SHOWN = 50, 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fdm_jax.cli.config import add_config_argument

    add_config_argument(parser, required=False)
    parser.set_defaults(config="configs/edm.py:digits")
    parser.add_argument(
        "--workdir", type=place_argument, default=Path("demo_run"), metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    import numpy as np

    from fdm_jax import pictures
    from fdm_jax.cli.config import load
    from fdm_jax.devices import make_mesh
    from fdm_jax.evaluation.digits import DigitJudge
    from fdm_jax.experiment import Experiment, open_data
    from fdm_jax.sampling.generate import BatchedGenerator
    from fdm_jax.training.checkpoints import Checkpoints
    from fdm_jax.training.loop import train

    config = load(args)
    source = open_data(config)
    experiment = Experiment.from_config(config, source.spec)
    if not train(experiment, source, args.workdir):
        return 0

    _, variables, _ = Checkpoints(args.workdir / "checkpoints", read_only=True).restore_model()
    classes = experiment.num_classes
    labels = np.arange(PER_CLASS * classes) % classes
    generator = BatchedGenerator(experiment.generate_fn(), make_mesh(), 100)
    images = np.concatenate(list(generator(variables, np.arange(len(labels)), labels)))
    picture = args.workdir / "digits.png"
    pictures.save_png(pictures.image_grid(images[: SHOWN * classes], classes, scale=6, gap=2), picture)

    judge = DigitJudge(data_dir=config.data.data_dir)
    share, real = judge.accuracy(images, labels), judge.held_out_accuracy
    print(f"Look at {picture}: a class per column.")
    print(
        f"A classifier reads {share:.1%} of {len(labels)} generated digits as the class asked for; "
        f"of held-out real digits it reads {real:.1%} right (ratio {share / real:.3f})."
    )
    return 0
