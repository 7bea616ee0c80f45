"""Thirty ends of a run at random moments, most of them without a warning: nothing of it is to be seen in what it makes."""

import signal
import time

import numpy as np
import pytest
import tiny
from cli.conftest import assert_same_end, rows, start

from fdm_jax.cli.main import main

STEPS, KILLS, DEVICES = 1200, 30, 8
MORE = [
    f"--config.train.images={16 * STEPS}", "--config.log.every_images=16", "--config.checkpoint.every_images=320",
    "--config.checkpoint.keep_every_images=100000", "--config.samples.every_images=3200", "--config.samples.rows=1",
    "--config.samples.steps=3", "--config.eval.every_images=3200", "--config.eval.held_out_images=20",
]  # fmt: skip


def seen(workdir):
    """The steps that it reports."""
    return [row["step"] for row in rows(workdir)] if (workdir / "metrics.jsonl").exists() else []


@pytest.mark.slow
def test_a_storm_of_kills(data_dir, tmp_path):
    """Data order, losses, figures and parameters equal the undisturbed run's, bit for bit."""
    rng = np.random.default_rng(20230612)
    straight, stormy = tmp_path / "straight", tmp_path / "stormy"
    assert main(tiny.arguments(straight, data_dir, *MORE)) == 0
    moments = []
    while len(moments) < KILLS:
        process = start(tiny.arguments(stormy, data_dir, *MORE), DEVICES)
        if rng.random() < 0.8:  # some come before the first step
            before, deadline = seen(stormy), time.monotonic() + 240
            while seen(stormy) == before:
                assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
                time.sleep(0.01)
        time.sleep(rng.exponential(0.5))
        process.send_signal(signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL)
        out, _ = process.communicate(timeout=240)
        assert process.returncode in (0, -signal.SIGTERM, -signal.SIGKILL), out
        moments.append(max(seen(stormy), default=0))
        assert moments[-1] < STEPS, f"the run is too short for {KILLS} kills: {moments}"
    print("steps at which it was ended:", moments)
    process = start(tiny.arguments(stormy, data_dir, *MORE), DEVICES)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert_same_end(stormy, straight, STEPS)
    assert rows(stormy) == rows(straight)
    for picture in (straight / "samples").iterdir():
        assert picture.read_bytes() == (stormy / "samples" / picture.name).read_bytes()
