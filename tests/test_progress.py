"""Progress when nobody is there to see it any more."""

import errno
import os
import pty
import subprocess
import sys

import pytest

from fdm_jax.progress import Progress


@pytest.fixture(params=["pipe", "terminal"])
def unread(request, monkeypatch):
    """stderr is a pipe whose reader has ended, or a terminal that was closed."""
    reader, writer = os.pipe() if request.param == "pipe" else pty.openpty()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield lambda: os.close(reader)


def test_work_goes_on_when_nobody_reads_of_it(unread):
    progress = Progress(30, 0)
    progress.count(10, "loss 1")
    unread()
    progress.count(20, "loss 1")
    progress.say("A line.")
    progress.count(30)
    progress.close()
    print("What libraries say.", file=sys.stderr, flush=True)


def test_a_full_disk_is_not_kept_to_itself(monkeypatch):
    """The run ends by it, with its own sentence, and where the log went."""

    class Full:
        isatty = staticmethod(lambda: False)
        flush = staticmethod(lambda: None)

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    with pytest.raises(OSError, match="No space left"):
        Progress(30, 0).say("A line.")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_ended_ends_quietly(unbuffered):
    """`fdm generate --list-solvers | head -1`."""
    command = [sys.executable, "-m", "fdm_jax", "generate", "--list-solvers"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
