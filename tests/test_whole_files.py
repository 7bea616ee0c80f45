"""Files that are written whole or not at all."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from fdm_jax.errors import UserError
from fdm_jax.whole_files import write_text, write_whole


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_write_that_fails_late_leaves_what_was_there(tmp_path, monkeypatch, fails):
    """Some file servers say that they are full when all of it was given to them."""
    path = tmp_path / "settings.json"
    write_text(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """A machine that loses its power would else leave an empty one."""
    path, flushed, real = tmp_path / "settings.json", [], os.fsync

    def fsync(descriptor):
        flushed.append((os.pread(descriptor, 10, 0), path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "new")
    assert flushed == [(b"new", False)] and path.read_text() == "new"


def test_a_pipe_is_given_the_content_and_stays(tmp_path):
    """Root could replace it, and /dev/null, which is no file of a disk either."""
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_text(path, "content")
    reader.join(10)
    assert read == ["content"] and stat.S_ISFIFO(path.stat().st_mode) and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has one")
def test_a_device_that_is_full_is_named(tmp_path):
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)
    with pytest.raises(OSError, match="No space left"):
        write_text(Path("/dev/full"), "content")
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def test_links_among_devices_stay(tmp_path, monkeypatch):
    """/dev/stdout is one, and may lead to a file."""
    link, file = tmp_path / "stdout", tmp_path / "file"
    file.write_text("old")
    link.symlink_to(file)
    monkeypatch.setattr("fdm_jax.whole_files.DEVICES", tmp_path)
    write_text(link, "new")
    assert link.is_symlink() and file.read_text() == "new" and sorted(tmp_path.iterdir()) == [file, link]


def test_a_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path} cannot be written: Is a directory.$"):
        write_whole(tmp_path, lambda file: file.write_text("content"))
