"""Data sets as they come, before they are prepared: splits of pictures that are read one by one."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from fdm_jax.data import images as image_files
from fdm_jax.data.archives import LABELS_FILE, Archive
from fdm_jax.data.labels import Labels, check_classes, find_labels
from fdm_jax.errors import UserError
from fdm_jax.storage_errors import system_fails


class RawSplit(Protocol):
    """Part of a data set: N images, all of one size."""

    labels: np.ndarray | None  # int32 [N]

    def __len__(self) -> int: ...

    def read(self, i: int) -> np.ndarray:
        """Image i, uint8 [R, R, C]; may be called from several threads.

        Raises:
          UserError: it is damaged, or not of the kind that is wanted; the sentence names it.
        """
        ...


@dataclasses.dataclass(frozen=True)
class RawData:
    """A data set to be prepared.

    Attributes:
      splits: train, and test if there is one.
      resolution, channels: R and C of all images.
      num_classes: 0 if unlabelled.
      class_names: () if they are not known.
      checksum: SHA-256 of the source; to be asked once every image was read.
      enlarged: how many pictures were smaller than the images made of them; likewise.
    """

    splits: Mapping[str, RawSplit]
    resolution: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...]
    checksum: Callable[[], str]
    enlarged: Callable[[], int] = lambda: 0


class ArraySplit:
    """Images in memory: uint8 [N, R, R, C], and labels int32 [N]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None):
        self._images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    def read(self, i: int) -> np.ndarray:
        return self._images[i]


@dataclasses.dataclass(frozen=True)
class PictureOptions:
    """How pictures become images.

    Attributes:
      resolution, transform: see :func:`fdm_jax.data.images.fit`.
      channels: see :func:`fdm_jax.data.images.decode_picture`.
    """

    resolution: int | None = None
    transform: str = "none"
    channels: int | None = None


class PictureSplit:
    """Picture files of an archive, made alike as they are read.

    Attributes:
      shape: (R, R, C), that of the first picture that can be read; the others must have it too.
    """

    def __init__(self, archive: Archive, names: Sequence[str], labels: np.ndarray | None, options: PictureOptions):
        self._archive, self._names, self.labels, self._options = archive, names, labels, options
        self._digests: dict[str, bytes] = {}
        self._enlarged: set[str] = set()
        self._lock = threading.Lock()
        self.shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> np.ndarray:
        name = self._names[i]
        where = f"{name} in {self._archive.path}"
        data = self._archive.read(name)
        digest = hashlib.sha256(data).digest()
        with self._lock:
            self._digests[name] = digest
        picture = image_files.decode_picture(data, where, self._options.channels)
        image = image_files.fit(picture, where, self._options.resolution, self._options.transform)
        if self.shape is not None and image.shape != self.shape:
            raise UserError(
                f"{where} is {image_files.ImageShape(*image.shape)}, but others are "
                f"{image_files.ImageShape(*self.shape)}: make them alike, with --resolution or --channels."
            )
        if min(picture.shape[:2]) < len(image):
            with self._lock:
                self._enlarged.add(name)
        return image

    def find_shape(self, skip_bad: bool) -> tuple[int, ...]:
        """Reads pictures until one is sound, which without ``skip_bad`` must be the first."""
        for i in range(len(self)):
            try:
                return self.read(i).shape
            except UserError as error:
                if not skip_bad or system_fails(error):
                    raise
        raise UserError(f"{self._archive.path} holds no readable picture.")

    def enlarged(self) -> int:
        """How many of the pictures read were smaller than the images made of them."""
        return len(self._enlarged)

    def lines(self) -> list[bytes]:
        """Name and digest of every file read, for a checksum."""
        return [name.encode(errors="surrogateescape") + b"\0" + digest for name, digest in self._digests.items()]


def read_pictures(
    archive: Archive,
    options: PictureOptions,
    *,
    labels: str = "auto",
    class_names: tuple[str, ...] = (),
    split_folders: Sequence[str] = (),
    skip_bad: bool = False,
) -> RawData:
    """Any tree of pictures, in the order of their names.

    Args:
      archive: a folder or zip.
      options: how pictures become images.
      labels: where classes come from, see :func:`fdm_jax.data.labels.find_labels`.
      class_names: of the classes in their order, instead of what the archive says.
      split_folders: names of splits that are the top-level folders; without them all is ``train``.
      skip_bad: whether bad pictures will be left out.

    Raises:
      UserError: there are no pictures, or no labels where they must be, or the first picture is bad.
    """
    files = archive.names()
    names = image_files.image_names(files)
    parts = _split(archive, names, split_folders) if split_folders else {"train": ("", names)}
    if not any(inside for _, inside in parts.values()):
        raise UserError(f"{archive.path} holds no image files: put some there, such as img00000000.png.")
    splits, found = {}, None
    for split, (prefix, inside) in parts.items():
        relative = [name.removeprefix(prefix) for name in inside]
        part = find_labels(archive, files, relative, labels)
        if part is not None:
            part = Labels(part.classes, class_names or part.class_names)
            check_classes(part.classes, part.class_names, [f"{name} in {archive.path}" for name in inside])
            if found is not None and part.class_names != found.class_names:
                raise UserError(
                    f"{archive.path} has the classes {', '.join(part.class_names)} in {split} and "
                    f"{', '.join(found.class_names)} elsewhere: they must be the same."
                )
            found = part if found is None else Labels(np.append(found.classes, part.classes), part.class_names)
        splits[split] = PictureSplit(archive, inside, None if part is None else part.classes, options)
    shape = next(iter(splits.values())).find_shape(skip_bad)
    for each in splits.values():
        each.shape = shape

    def checksum() -> str:
        lines = [line for split in splits.values() for line in split.lines()]
        if labels != "none" and LABELS_FILE in files:
            lines.append(LABELS_FILE.encode() + b"\0" + hashlib.sha256(archive.read(LABELS_FILE)).digest())
        return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()

    num_classes = 0 if found is None else len(found.class_names) or int(found.classes.max()) + 1
    names_found = () if found is None else found.class_names

    def enlarged() -> int:
        return sum(split.enlarged() for split in splits.values())

    return RawData(splits, shape[0], shape[2], num_classes, names_found, checksum, enlarged)


def _split(archive: Archive, names: Sequence[str], splits: Sequence[str]) -> dict[str, tuple[str, list[str]]]:
    """split -> (its folder with a slash, names in it); all of them may lie in one more folder."""
    tops = {name.split("/")[0] for name in names}
    above = f"{tops.pop()}/" if len(tops) == 1 and not tops & set(splits) else ""
    parts = {}
    for folder in (f"{above}{split}/" for split in splits):
        inside = [name for name in names if name.startswith(folder)]
        if not inside:
            raise UserError(
                f"{archive.path} has no pictures in {folder}: it should have them in {' and '.join(splits)}."
            )
        parts[folder.removeprefix(above).rstrip("/")] = folder, inside
    return parts
