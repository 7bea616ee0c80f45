"""What a place for files can do, a local folder or gs://: files that are written whole or not at all, and a few moves.

A reader of a file sees the old one or the new.  Local paths stay ``pathlib.Path``; those on Google Cloud Storage are
``epath.Path`` over gcsfs, and behave alike where this module does not say otherwise.  Objects cannot be appended to or
renamed, and there are no folders: nothing need be made before it is written into.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.storage_errors import disk_full, refusal, system_fails

_REMOTE = "gs://"
DEVICES = Path("/dev")


# --- Places ---


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is on Google Cloud Storage."""
    return os.fspath(path).startswith(_REMOTE)


def local(text: str) -> Path:
    """A local path; shells leave the `~` of ``--workdir=~/runs`` to the program.

    Raises:
      UserError: it begins with the name of a user who is not known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text} cannot be found: the home of its user is not known here.") from error


def place(path: str | os.PathLike[str]) -> Path:
    """A local path, or one that begins with gs://; `~` is the user's home.

    Raises:
      UserError: it begins with another such word, has no bucket, or gcsfs is not installed; see also :func:`local`.
    """
    text = os.fspath(path)
    if "://" not in text:
        return local(text)
    if not is_remote(text):
        raise UserError(f"{text} cannot be used: give a local path, or one on Google Cloud Storage (gs://BUCKET/NAME).")
    if not text.removeprefix(_REMOTE).partition("/")[0]:
        raise UserError(f"{text} names no bucket: write it as gs://BUCKET/NAME.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f'{text} is on Google Cloud Storage, which needs gcsfs: pip install "fdm_jax[gcs]".')
    os.environ.setdefault("EPATH_USE_TF", "false")  # etils would use TensorFlow for gs:// wherever it is installed
    import aiohttp
    import fsspec.config
    from etils import epath

    for library in ("fsspec", "gcsfs"):  # they log, with a traceback, what they raise as well
        logging.getLogger(library).setLevel(logging.CRITICAL)
    # gcsfs remembers what folders hold, and would not see what TensorStore or other processes write.
    gcs = fsspec.config.conf.setdefault("gcs", {})
    gcs["use_listings_cache"] = False
    # It would wait for ever for an answer that a broken network has lost.
    gcs["requests_timeout"] = aiohttp.ClientTimeout(sock_connect=30, sock_read=60)
    return epath.Path(text)  # type: ignore[return-value]


def filesystem() -> Any:
    """gcsfs, for what paths cannot do."""
    from etils.epath import backend

    return backend.fsspec_backend.fs(_REMOTE)


def resolved(path: Path) -> Path:
    """The absolute path, without links."""
    return path if is_remote(path) else path.resolve()


def check_utf8(path: Path) -> None:
    """Refuse a path that TensorStore, array_record and XLA, which are not Python, could not take.

    Raises:
      UserError: its name has bytes that are not UTF-8; Python makes surrogates of them.
    """
    if re.search("[\ud800-\udfff]", str(path)):
        raise UserError(
            f"{str(path)!r} has bytes that are not UTF-8, and cannot hold data, checkpoints or compiled programs: "
            "rename it, or set PYTHONUTF8=1 if it only looks so."
        )


# --- Files ---


def replace_file(path: Path, write: Callable[[Path], Any], flush: bool = True) -> None:
    """Let ``write`` fill a local file, which then takes the final one's place; its folder must be there.

    What is no file of a disk keeps its place, and is given the content: /dev/null (root could replace it), a pipe.

    Args:
      path, write: which, and how.
      flush: wait until the disk has it: a machine that loses its power right after may else leave an empty file.

    Raises:
      OSError: it cannot be written.
    """
    if is_remote(path) or _is_device(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            write(local)
            if is_remote(path):
                # One request, or for a large file one upload of several, which is there when it is finished.
                filesystem().put_file(os.fspath(local), os.fspath(path))
            else:
                with local.open("rb") as made, path.open("wb") as device:
                    shutil.copyfileobj(made, device)
        return
    if path.parent == DEVICES:
        path = path.resolve()  # /dev/stdout is a link, to a file of the shell's perhaps
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        if flush:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # which is not what went wrong first
            temporary.unlink(missing_ok=True)
        raise


def _is_device(path: Path) -> bool:
    """Whether it is there, and is neither a folder nor a file of a disk."""
    return path.exists() and not path.is_dir() and not path.is_file()


def write_whole(path: Path, write: Callable[[Path], Any], flush: bool = True) -> None:
    """The same; the folder is made.

    Raises:
      UserError: it cannot be written; a full disk is left to the command line, which has a sentence for it.
    """
    try:
        make_folder(path.parent)
        replace_file(path, write, flush)
    except OSError as error:
        if disk_full(error):
            raise
        bucket = is_remote(path) and isinstance(error, FileNotFoundError)
        cause = "there is no such bucket" if bucket else error.strerror or refusal(error) or error
        raise UserError(f"{path} cannot be written: {cause}.") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; its folder must be there."""
    replace_file(path, lambda temporary: temporary.write_text(text))


def append_text(path: Path, text: str) -> None:
    """Add to the end of a file; an object is read and written anew."""
    if is_remote(path):
        write_text(path, (path.read_text() if path.exists() else "") + text)
        return
    with path.open("a") as file:
        file.write(text)


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an ``.npz``.

    Raises:
      UserError: it cannot be written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, NumPy would change it
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, write)


@contextlib.contextmanager
def made_again(path: Path) -> Iterator[None]:
    """For reading a file that a command makes if it is not there.

    Raises:
      UserError: it is damaged, as after a loss of power.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # zlib, zipfile, NumPy: a damaged file makes them raise nearly anything
        if system_fails(error):
            raise
        raise UserError(f"{path} is damaged: delete it, and the same command makes it again.") from error


# --- Folders ---


def make_folder(path: Path) -> None:
    """With those above it.  Nothing to do for objects; gcsfs would make the bucket."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def check_unclaimed(folder: Path, names: Iterable[str], option: str) -> None:
    """Refuse a folder of somebody's, such as the current one, whose files a command would write over.

    Args:
      folder, names: where, and which; they may be folders.
      option: that gives the folder.

    Raises:
      UserError: one of them is there.
    """
    if there := [name for name in names if (folder / name).exists()]:
        raise UserError(f"{folder} holds {', '.join(there)} of something else: give another {option}.")


def file_sizes(folder: Path) -> dict[str, int]:
    """Names of the files in a folder, and their bytes; objects are asked for together, not one by one."""
    try:
        if is_remote(folder):
            found = filesystem().ls(os.fspath(folder), detail=True)
            return {each["name"].rpartition("/")[2]: each["size"] for each in found if each["type"] == "file"}
        return {each.name: each.stat().st_size for each in os.scandir(folder) if each.is_file()}
    except FileNotFoundError:
        return {}


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Files of a folder; objects many at a time."""
    paths = [folder / name for name in names]
    if is_remote(folder):
        filesystem().rm([os.fspath(path) for path in paths])
    else:
        for path in paths:
            path.unlink()


def remove_folder(path: Path) -> None:
    """With all that is in it."""
    if is_remote(path):
        filesystem().rm(os.fspath(path), recursive=True)
    else:
        shutil.rmtree(path)


def move_folder(path: Path, target: Path) -> None:
    """To where nothing is.  Objects move one by one: killed in between, some are here and some there."""
    if is_remote(path):
        filesystem().mv(os.fspath(path), os.fspath(target), recursive=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a local file; yields False where the file system has no locks."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True  # closing the file unlocks it, and so does the death of the process
