"""Thirty ends of a run at random moments, most of them without a warning: nothing of it is to be seen in what it makes."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from cli.conftest import assert_same_end, environment, rows, start, start_all

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
        time.sleep(rng.exponential(1.0))
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


def children_of(pid):
    """The numbers of a process's own processes."""
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.slow
def test_a_storm_over_two_processes(data_dir, tmp_path):
    """One of the two is ended, and the launcher starts both again: the same bits as those of two that nobody disturbed."""
    rng = np.random.default_rng(2306)
    steps = 400
    more = [*MORE, f"--config.train.images={16 * steps}"]
    straight, stormy = tmp_path / "straight", tmp_path / "stormy"
    for process in start_all(tiny.arguments(straight, data_dir, *more), 2):
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out
    fdm = shlex.join([sys.executable, "-m", "fdm_jax"])
    launcher = subprocess.Popen(
        [sys.executable, "launch/local.py", "--processes=2", "--max-restarts=1000", "--backoff=0.01", f"--fdm={fdm}",
         "--", *tiny.arguments(stormy, data_dir, *more)],
        env=environment(1), cwd=tiny.ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    moments: list[int] = []
    while len(moments) < 8:
        before, deadline = seen(stormy), time.monotonic() + 240
        while seen(stormy) == before:
            assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()[0]
            time.sleep(0.01)
        time.sleep(rng.exponential(0.5))
        children = [
            pid for pid in children_of(launcher.pid) if b"fdm_jax" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        if len(children) == 2:
            os.kill(int(rng.choice(children)), signal.SIGTERM if rng.random() < 0.3 else signal.SIGKILL)
            moments.append(max(seen(stormy), default=0))
    print("steps at which one was ended:", moments)
    out, _ = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, out
    assert out.count("starting again") >= 6, out
    assert_same_end(stormy, straight, steps)
    assert rows(stormy) == rows(straight)
