"""From a data set as it comes to a prepared one: which reader, which builder, and what must fit together."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
from pathlib import Path

from fdm_jax.data.archives import LABELS_FILE, open_archive
from fdm_jax.data.builders import BUILDERS, LocalImages, prepare
from fdm_jax.data.cifar import read_cifar10
from fdm_jax.data.idx import read_idx
from fdm_jax.data.images import image_names
from fdm_jax.data.prepared import PreparedSource, find_prepared
from fdm_jax.data.raw import PictureOptions, RawData, read_pictures
from fdm_jax.data.sources import MAX_READERS
from fdm_jax.errors import UserError

MAX_RESOLUTION = 4096
_PICTURES = ("folder", "zip")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be prepared, and how.

    Attributes:
      name: a key of :data:`fdm_jax.data.builders.BUILDERS`.
      source: a file or folder.
      config: tells sets of one name apart; after the source by default for ``folder`` and ``zip``.
      resolution, transform, channels: see :class:`fdm_jax.data.raw.PictureOptions`.
      labels: see :func:`fdm_jax.data.labels.find_labels`.
      classes: names of the classes, in the order of their numbers; () to take what the source says.
      skip_bad: whether bad pictures are left out and counted.
      threads: pictures read at the same time.
    """

    name: str
    source: Path
    config: str | None = None
    resolution: int | None = None
    transform: str = "none"
    labels: str = "auto"
    classes: tuple[str, ...] = ()
    channels: int | None = None
    skip_bad: bool = False
    threads: int = 4

    @property
    def full_name(self) -> str:
        """``cifar10``, ``folder/cats``: what ``data.source`` says."""
        config = self.config
        if config is None and self.name in _PICTURES:
            config = self.source.resolve().stem
        return f"{self.name}/{config}" if config else self.name


def prepare_dataset(request: Request, data_dir: Path) -> tuple[Path, list[str]]:
    """Prepares a data set below ``data_dir``, unless it is there from the same source with the same options.

    Returns:
      Its folder, and a sentence for each picture that was left out now.

    Raises:
      UserError: the request, the source or a picture in it is not right, or the set is there from another source.
      OSError: ``data_dir`` cannot be written.
    """
    _check(request)
    options = {field: getattr(request, field) for field in ("resolution", "transform", "labels", "channels")}
    source = os.path.basename(os.path.abspath(request.source))  # "." and ".." have no name of their own
    metadata = {"source": source, "classes": ",".join(request.classes), **options}
    left_out: list[str] = []
    found = find_prepared(request.full_name, data_dir)
    if found is None:
        raw = _read(request)
        for name in raw.class_names:
            # TFDS writes one a line in UTF-8, and leaves out empty ones when it reads: the others would move up.
            if not name or name != name.strip() or re.search("[\r\n\ud800-\udfff]", name):
                raise UserError(
                    f"{request.source} has a class called {name!r}, which cannot be kept so: rename it, or name all of "
                    "them with --classes."
                )
        metadata["mark"] = _mark(request, raw)
        _check_space(data_dir, sum(map(len, raw.splits.values())) * raw.resolution**2 * raw.channels)

        def make_builder() -> LocalImages:
            return BUILDERS[request.name](
                raw=raw, metadata=metadata, threads=request.threads, skip_bad=request.skip_bad, left_out=left_out,
                data_dir=str(data_dir), config=request.full_name.partition("/")[2] or None,
            )  # fmt: skip

        found = prepare(data_dir, request.full_name, make_builder)
    # Also of what was not there: another process may have been faster, with another source or other options.
    before = PreparedSource(found, "all").metadata
    changed = [field for field, value in metadata.items() if field != "mark" and before.get(field) != value]
    # The source may be gone, and sets of older versions of fdm_jax have no mark.
    if "source" not in changed and "mark" in before and request.source.exists():
        changed += ["source"] * (before["mark"] != (metadata.get("mark") or _mark(request)))
    if changed:
        raise UserError(
            f"{request.full_name} is prepared already, with another {' and '.join(changed)}: delete {found} to make "
            f"it anew{', or give another --name' if '/' in request.full_name else ''}."
        )
    return found, left_out


def _mark(request: Request, raw: RawData | None = None) -> str:
    """Tells sources of one name apart, such as cats/train and dogs/train, without reading all of their pictures."""
    if request.name in ("cifar10", "mnist"):  # their folders may hold anything else; they are read in seconds
        return (raw or _read(request)).checksum()
    archive = open_archive(request.source)
    files = archive.names()
    labels = archive.read(LABELS_FILE) if LABELS_FILE in files else b""
    return hashlib.sha256(archive.mark(image_names(files)).encode() + labels).hexdigest()


def _check(request: Request) -> None:
    made_in_one_way = UserError(
        f"{request.name} is always made in one way: only its --source can be chosen, or prepare it as a folder."
    )
    default = Request(name=request.name, source=request.source)
    for field in ("config", "resolution", "classes"):
        if getattr(request, field) != getattr(default, field) and request.name not in (*_PICTURES, "mnist"):
            raise made_in_one_way
    for field in ("transform", "labels", "channels"):
        if getattr(request, field) != getattr(default, field) and request.name not in _PICTURES:
            raise made_in_one_way
    if request.resolution is not None and not 1 <= request.resolution <= MAX_RESOLUTION:
        raise UserError(f"--resolution must be from 1 to {MAX_RESOLUTION}, and is {request.resolution}.")
    if not 1 <= request.threads <= MAX_READERS:
        raise UserError(f"--threads must be from 1 to {MAX_READERS}, and is {request.threads}.")
    if len({*request.classes}) < len(request.classes) or not all(name.strip() for name in request.classes):
        raise UserError(f"--classes must be different words with commas between, and is {','.join(request.classes)!r}.")
    word = request.full_name.partition("/")[2]
    if word and not re.fullmatch(r"\w[\w.-]*", word):
        raise UserError(f"{word!r} cannot be the name of a data set: give one of letters, digits, - and _ with --name.")


def _read(request: Request) -> RawData:
    if request.name == "cifar10":
        return read_cifar10(request.source)
    if request.name == "mnist":
        raw = read_idx(request.source, request.resolution)
        if not request.classes:
            return raw
        if len(request.classes) < raw.num_classes:
            raise UserError(
                f"--classes names {len(request.classes)}, but {request.source} has {raw.num_classes} classes."
            )
        return dataclasses.replace(raw, class_names=request.classes, num_classes=len(request.classes))
    archive = open_archive(request.source)
    if request.name == "ffhq64":
        return read_pictures(archive, PictureOptions(64, channels=3), labels="none", skip_bad=request.skip_bad)
    if request.name == "afhqv2":
        options, splits = PictureOptions(64, channels=3), ("train", "test")
        return read_pictures(archive, options, labels="folders", split_folders=splits, skip_bad=request.skip_bad)
    labels = "edm" if (request.name, request.labels) == ("zip", "auto") else request.labels
    raw = read_pictures(
        archive, PictureOptions(request.resolution, request.transform, request.channels),
        labels=labels, class_names=request.classes, skip_bad=request.skip_bad,
    )  # fmt: skip
    if request.classes and not raw.num_classes:
        raise UserError(f"--classes names classes, but {request.source} has no labels: leave it out.")
    return raw


def _check_space(data_dir: Path, needed: int) -> None:
    existing = next(path for path in (data_dir, *data_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"{data_dir} has {free // 2**20:,} MiB left, and {-(-needed // 2**20):,} are needed: make room, or give "
            "another --data_dir."
        )
