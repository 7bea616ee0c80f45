"""What a run reports is on the disk when it is reported, and takes back what earlier starts said of later steps."""

import contextlib
import errno
import itertools
import json
import struct
import time

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event

from fdm_jax.training.writers import Writers


@pytest.fixture(autouse=True)
def one_file_each(monkeypatch):
    """The names of TensorBoard's files tell seconds apart, and starts that are less than one apart are tests only."""
    seconds = itertools.count(1_700_000_000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))


def seen_by_tensorboard(workdir):
    """(images, name) of all figures, in order, without those that a later start takes back."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("Q", content[:8])
            event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
            if event.HasField("session_log"):
                found = [(nimg, name) for nimg, name in found if nimg < event.step]
            found += [(event.step, value.tag) for value in event.summary.value]
    return found


def test_nothing_reported_is_lost_or_there_twice(tmp_path):
    """Without a close, as after a kill: before the first checkpoint, and after it."""
    starts = []
    for step in (0, 0, 2):  # that the start begins at
        run = Writers(tmp_path, step, 16 * step)
        starts.append(run)
        for after in range(step + 1, step + 4):
            run.scalars({"step": after, "nimg": 16 * after, "loss": 1.0})
        run.image("samples", np.zeros((4, 4, 3), np.uint8), 16 * after)
    steps = [1, 2, 3, 4, 5]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == steps
    assert seen_by_tensorboard(tmp_path) == [*((16 * step, "loss") for step in steps), (80, "samples")]
    for run in starts:
        run.close()


def test_lines_that_are_no_rows_are_left_out(tmp_path):
    """A row that a crash cut short, and what other programs may have added."""
    rows = [{"step": 1, "nimg": 16, "loss": 2.0}, {"step": 2, "nimg": 32, "loss": 1.0}]
    lines = [
        json.dumps(rows[0]).encode(),
        b"[1]",
        b'{"note": "mine"}',
        b'{"step": 2, "nimg": \xff',
        json.dumps(rows[1]).encode(),
        b'{"step": 3, "ni',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run = Writers(tmp_path, 5, 80)
    run.close()
    assert run.rows == rows


def test_full_disk_is_an_error_at_once(tmp_path, monkeypatch):
    full = open("/dev/full", "wb")
    monkeypatch.setattr(record_writer, "open_file", lambda path: full)
    run = Writers(tmp_path, 0, 0)
    with pytest.raises(OSError) as raised:
        run.scalars({"step": 1, "nimg": 16, "loss": 1.0})
    assert raised.value.errno == errno.ENOSPC
    with contextlib.suppress(OSError):
        full.close()
