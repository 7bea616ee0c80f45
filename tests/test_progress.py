"""Progress when nobody is there to see it any more, or there is no room for it."""

import errno
import io
import os
import pty
import re
import subprocess
import sys
import time

import pytest

from fdm_jax.progress import Progress, say, significant


@pytest.fixture(params=["pipe", "terminal"])
def unread(request, monkeypatch):
    """stderr is a pipe whose reader has ended, or a terminal that was closed."""
    reader, writer = os.pipe() if request.param == "pipe" else pty.openpty()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield lambda: os.close(reader)


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (0.123456, 4, "0.1235"),
        (1.5, 3, "1.5"),
        (999.4, 3, "999"),
        (999.6, 3, "1,000"),  # and not 1e+03, as Python rounds it
        (-4912.3, 3, "-4,912"),
        (9999.5, 4, "10,000"),
        (1.5e14, 4, "150,000,000,000,000"),
        (1e30, 4, "1e+30"),
        (0.0, 4, "0"),
        (float("inf"), 4, "inf"),
        (float("nan"), 4, "nan"),
    ],
)
def test_digits_of_numbers(value, digits, shown):
    assert significant(value, digits) == shown


def test_work_goes_on_when_nobody_reads_of_it(unread):
    progress = Progress(30, 0)
    progress.count(10, "loss 1")
    unread()
    progress.count(20, "loss 1")
    progress.say("A line.")
    progress.count(30)
    progress.close()
    print("What libraries say.", file=sys.stderr, flush=True)


def test_a_line_a_minute_and_at_the_end(monkeypatch, capsys):
    clock = iter([0, 59, 61, 120, 122, 125])  # at the beginning, and at each count
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress(500, 100, seconds=60)
    for done in (200, 222, 300, 344, 500):
        progress.count(done, "evaluating")
    assert capsys.readouterr().err.split("\n") == [
        "        222 of 500 images ( 44%)  evaluating  2 img/s  2:19 left",
        "        344 of 500 images ( 69%)  evaluating  2 img/s  1:18 left",
        "        500 of 500 images (100%)  evaluating  3.2 img/s  0:00 left",
        "",
    ]


def test_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)  # no thread
    progress = Progress(500, 100)
    for done in (200, 300):
        time.sleep(0.11)  # a bar is drawn ten times a second at most
        progress.count(done, "loss 0.7  ")
    progress.say("A line.")
    progress.close()
    shown = terminal.getvalue()
    bars = [line for line in shown.split("\r") if "|" in line]
    assert " 20%|" in bars[0] and "100/500 [" in bars[0]
    assert any(re.search(r" 60%\|.*300/500 \[00:0\d<00:0\d, .*img/s, loss 0\.7\]", bar) for bar in bars)
    assert "A line.\n" in shown


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_a_log_that_cannot_be_written_for_a_time(monkeypatch, tmp_path, number):
    """The work goes on, and later lines are in it again."""

    class Log(io.FileIO):
        works = True

        def write(self, data):
            if not self.works:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    raw = Log(tmp_path / "log", "w")
    with io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=True) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        progress = Progress(30, 0)
        progress.count(10)
        raw.works = False
        progress.count(20)
        say("A line of another kind.")
        raw.works = True
        progress.count(30)
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].split()[0] == "10" and lines[-1].split()[0] == "30"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_ended_ends_quietly(unbuffered):
    """`fdm generate --list-solvers | head -1`."""
    command = [sys.executable, "-m", "fdm_jax", "generate", "--list-solvers"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
