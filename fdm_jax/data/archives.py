"""A zip or a folder of image files as one thing: sorted names in, bytes out, every failure one sentence."""

from __future__ import annotations

import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fdm_jax.errors import UserError
from fdm_jax.storage_errors import system_fails

LABELS_FILE = "dataset.json"

# Pictures hardly compress: an archive that claims to grow by more than this is a bomb, whatever it holds.
MAX_GROWTH, MAX_HARMLESS = 200, 2**28  # times its own size, and bytes below which growth does not matter

MARKED, MARKED_BYTES = 64, 2**16  # files of a folder that its mark looks into, and how far from either end


class Archive(Protocol):
    """Files by name, names being relative paths with forward slashes (``00000/img00000000.png``).

    ``read`` may be called from several threads, after a fork, and on a pickled copy.
    """

    path: Path

    def names(self) -> list[str]:
        """All files, sorted by name: the order that defines the index of an image."""
        ...

    def read(self, name: str, size: int = -1) -> bytes:
        """The first ``size`` bytes of the file (all of them by default).

        Raises:
          UserError: the file is missing or cannot be read in full.
        """
        ...

    def mark(self, names: Sequence[str]) -> str:
        """A digest that differs, as good as always, where these files do; they are not read in full."""
        ...


def open_archive(path: str | os.PathLike[str]) -> Archive:
    """Opens a zip file or a folder.

    Raises:
      UserError: nothing is there, or it is a file that is not a sound zip, or one made to do harm.
    """
    path = Path(path)
    if path.is_dir():
        return FolderArchive(path)
    if path.is_file():  # not a pipe, for which to wait
        return ZipArchive(path)
    raise UserError(f"no zip file or folder is at {path}: give the path of a data set in EDM's layout.")


def check_member(name: str, archive: Path, seen: set[str]) -> None:
    """Refuse a member that climbs out of its archive, or whose name was ``seen`` already; then it has been.

    Nothing is ever unpacked to the disk, but an archive with such names was made to do harm, or is broken.

    Raises:
      UserError: one of the two.
    """
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise UserError(f"{archive} holds {name!r}, a path that leads out of the archive: it is not to be trusted.")
    if name in seen:
        raise UserError(f"{archive} holds two files called {name!r}: make the archive anew.")
    seen.add(name)


def check_growth(unpacked: int, archive: Path) -> None:
    """Refuse an archive whose members claim so many bytes in all that it must be a bomb.

    Raises:
      UserError: it is one.
    """
    size = archive.stat().st_size
    if unpacked > max(MAX_GROWTH * size, MAX_HARMLESS):
        raise UserError(
            f"{archive} has {size:,} bytes and claims to hold {unpacked:,}: no pictures compress so well, "
            "and it is not to be trusted."
        )


def _is_hidden(name: str) -> bool:
    """Whether the name is a by-product of an operating system (``__MACOSX/._a.png``), never data."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


class FolderArchive:
    """The files below a folder, at any depth, also where links lead to folders."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        def fail(error: OSError) -> None:  # os.walk would pass over a folder that it cannot list
            raise UserError(f"{error.filename} cannot be listed ({error.strerror}).") from error

        found: list[str] = []
        # Folder -> itself and all above it, without links.
        within: dict[str, tuple[str, ...]] = {os.fspath(self.path): (os.path.realpath(self.path),)}
        for folder, folders, files in os.walk(self.path, onerror=fail, followlinks=True):
            above = within.pop(folder)
            for name in list(folders):
                path = os.path.join(folder, name)
                real = os.path.realpath(path) if os.path.islink(path) else os.path.join(above[-1], name)
                if _is_hidden(name) or real in above:  # a link back up leads to nothing new, for ever
                    folders.remove(name)
                else:
                    within[path] = (*above, real)
            found += [Path(folder, file).relative_to(self.path).as_posix() for file in files]
        return sorted(name for name in found if not _is_hidden(name))

    def read(self, name: str, size: int = -1) -> bytes:
        try:
            with open(self.path / name, "rb") as file:
                return file.read(size)
        except FileNotFoundError as error:
            raise UserError(f"{name} is missing from the folder {self.path}.") from error
        except OSError as error:
            raise UserError(f"{name} in {self.path} cannot be read ({error.strerror}).") from error

    def mark(self, names: Sequence[str]) -> str:
        """Of all names and sizes, and of the ends of the first file and of others spread over the rest."""
        digest = hashlib.sha256()
        for i, name in enumerate(names):
            digest.update(name.encode(errors="surrogateescape") + b"\0")
            try:
                size = (self.path / name).stat().st_size
                digest.update(b"%d\0" % size)
                if i % -(-len(names) // MARKED) == 0:
                    with open(self.path / name, "rb") as file:
                        digest.update(file.read(MARKED_BYTES))
                        file.seek(max(size - MARKED_BYTES, 0))
                        digest.update(file.read(MARKED_BYTES))
            except OSError as error:
                # One that is missing or damaged is for others to complain of, and always so: the mark stays the same.
                if system_fails(error):
                    raise UserError(f"{name} in {self.path} cannot be read ({error.strerror}).") from error
        return digest.hexdigest()


class ZipArchive:
    """The entries of a zip file, stored or compressed."""

    def __init__(self, path: Path):
        self.path = path
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        seen: set[str] = set()
        for entry in self._zip().infolist():  # what is wrong is to be reported here, not at the first batch
            check_member(entry.filename, path, seen)
        check_growth(sum(entry.file_size for entry in self._zip().infolist()), path)

    def _zip(self) -> zipfile.ZipFile:
        # A ZipFile locks its own reads, so threads may share one; a forked child must not, because it would
        # share the file offset with its parent. Hence one per process.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            # NotImplementedError: a version that is not known; ValueError: names that are no text.
            except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
                raise UserError(
                    f"{self.path} is not a zip file, or a damaged or incomplete one ({error}): "
                    "give a zip or folder in EDM's layout, and copy it again if it should be sound."
                ) from error
            except OSError as error:
                raise UserError(f"{self.path} cannot be opened ({error.strerror}).") from error
        return self._opened[1]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_opened": None}

    def names(self) -> list[str]:
        return sorted(name for name in self._zip().namelist() if not name.endswith("/") and not _is_hidden(name))

    def read(self, name: str, size: int = -1) -> bytes:
        try:
            with self._zip().open(name) as file:
                return file.read(size)
        except KeyError as error:
            raise UserError(f"{name} is missing from {self.path}.") from error
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
            # RuntimeError: the entry is encrypted; or, as NotImplementedError, packed in an unknown way.
            if isinstance(error, OSError) and error.strerror:  # the system's
                raise UserError(f"{name} in {self.path} cannot be read ({error.strerror}).") from error
            raise UserError(f"{name} in {self.path} cannot be read ({error}): is the zip damaged?") from error

    def mark(self, names: Sequence[str]) -> str:
        """Of all names and checksums."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode(errors="surrogatepass") + b"\0%d\0" % self._zip().getinfo(name).CRC)
        return digest.hexdigest()
