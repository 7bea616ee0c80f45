"""Files that are written whole or not at all."""

import errno
import os

import pytest

from fdm_jax.whole_files import write_text


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
