"""A run as small as it gets, for tests of the shell: a few thousand parameters, 8x8 digits."""

import os
import pathlib
import re
import resource
import subprocess
import sys

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


def peak_memory():
    """The most memory that this process has had, in bytes."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage counts the process that started this one too
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_script(script, *arguments):
    """A Python program of its own, which can import this module."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )  # fmt: skip
