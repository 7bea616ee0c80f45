"""A run as small as it gets, for tests of the shell: a few thousand parameters, 8x8 digits."""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = f"{ROOT}/configs/edm.py:digits"
OVERRIDES = [
    "--config.network.model_channels=4",
    "--config.network.channel_mult=(1,)",
    "--config.network.channel_mult_emb=1",
    "--config.network.dropout=0.1",
    "--config.augment.probability=0.0",
    "--config.train.batch_size=16",
    "--config.train.images=320",
    "--config.train.lr_rampup_images=64",
    "--config.train.ema_halflife_images=64",
    "--config.warmup_steps=13",
    "--config.log.every_images=64",
    "--config.checkpoint.every_images=64",
    "--config.checkpoint.keep_latest=3",
    "--config.checkpoint.keep_every_images=128",
    "--config.samples.every_images=0",
    "--config.eval.every_images=0",
]


def arguments(workdir, *more, command="train"):
    """Command line of the tiny run."""
    return [command, f"--config={CONFIG}", f"--workdir={workdir}", *OVERRIDES, *more]
