"""Data on Google Cloud Storage, copied once to this host: array_record and zipfile read local files alone."""

from __future__ import annotations

import base64
import concurrent.futures
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fdm_jax.errors import UserError
from fdm_jax.progress import say
from fdm_jax.user_dirs import user_cache_dir
from fdm_jax.whole_files import filesystem, is_remote, locked

_AT_A_TIME = 16  # objects


def local_copy(path: Path) -> Path:
    """The path itself if it is local; else that of a local copy of the object, or of all objects below it.

    Copies are kept in the user's cache directory by what they are copies of: the names of the objects and their
    generations.  So a changed object is copied again, and the copy of the old one stays for those who still read it.
    Of several processes on a host one copies and the others wait.

    Raises:
      UserError: nothing is there, or it did not arrive as it was sent.
      OSError: it cannot be read, or the cache not be written.
    """
    if not is_remote(path):
        return path
    objects = _objects(path)
    listing = json.dumps([os.fspath(path), sorted((name, info["generation"]) for name, info in objects.items())])
    key = hashlib.sha256(listing.encode()).hexdigest()[:16]
    cache = user_cache_dir() / "gs"
    copy = cache / key / path.name
    if copy.exists():
        return copy
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{key}.lock") as alone:
        if alone:
            for remains in cache.glob(f"{key}.part.*"):  # of one that was killed
                shutil.rmtree(remains, ignore_errors=True)
        if not copy.exists():
            part = Path(tempfile.mkdtemp(prefix=f"{key}.part.", dir=cache))
            try:
                _fetch(path, objects, part / path.name)
                os.rename(part, cache / key)
            except OSError:
                # Without a lock another process may have renamed its copy first, which does as well.
                if not copy.exists():
                    raise
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return copy


def _objects(path: Path) -> dict[str, dict[str, Any]]:
    """{name below the path: what the bucket says of the object}; the name is empty if the path is an object itself."""
    prefix = os.fspath(path).removeprefix("gs://")
    try:
        found = filesystem().find(prefix, detail=True)
    except FileNotFoundError:  # no such bucket
        found = {}
    objects = {
        name.removeprefix(prefix).lstrip("/"): info
        for name, info in found.items()
        # Google's console and gcsfuse make an empty object for each folder.
        if info["type"] == "file" and not (name.endswith("/") and not info["size"])
    }
    if not objects:
        raise UserError(f"There is nothing at {path}: give the path of a data set, a zip or a folder in your bucket.")
    for name in objects:
        if ".." in name.split("/") or name.endswith("/"):
            raise UserError(f"{path} holds {name!r}, which is no name for a file: give another source.")
    return objects


def _fetch(path: Path, objects: dict[str, dict[str, Any]], target: Path) -> None:
    """Copy all objects into a file or folder, with a bar or a line."""
    size = sum(info["size"] for info in objects.values())

    def fetch(name: str, info: dict[str, Any]) -> None:
        local = target / name if name else target
        local.parent.mkdir(parents=True, exist_ok=True)
        filesystem().get_file(info["name"], os.fspath(local), callback=_Bytes(bar))
        if local.stat().st_size != info["size"] or not _sum_is_right(local, info):
            raise UserError(
                f"{path / name if name else path} changed while it was copied, or was damaged on the way: give the same "
                "command again."
            )

    with (
        tqdm(desc=f"Copying {path}", total=size, unit="B", unit_scale=True, disable=None) as bar,
        concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as threads,
    ):
        if bar.disable:  # no terminal
            say(f"Copying {path}, {size / 2**20:,.0f} MiB.")
        futures = [threads.submit(fetch, name, info) for name, info in objects.items()]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _sum_is_right(local: Path, info: dict[str, Any]) -> bool:
    """Whether the checksum is that of the object; MD5, or where an object was composed of others CRC32C."""
    import google_crc32c

    with local.open("rb") as file:
        if "md5Hash" in info:
            return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode() == info["md5Hash"]
        checksum = google_crc32c.Checksum()
        while chunk := file.read(2**20):
            checksum.update(chunk)
        return base64.b64encode(checksum.digest()).decode() == info["crc32c"]


class _Bytes:
    """What gcsfs calls as bytes come."""

    def __init__(self, bar: Any):
        self._bar = bar

    def set_size(self, size: int | None) -> None:
        """The bar knows it."""

    def relative_update(self, count: int = 1) -> None:
        """So many more."""
        self._bar.update(count)

    def absolute_update(self, count: int) -> None:
        """Not used by gcsfs."""
