"""Where images come from: zips and folders here, prepared sets in :mod:`fdm_jax.data.prepared`; and what wraps them.

A source is a fixed, indexable collection of ``uint8 [H, W, C]`` images, all of one square size, each with a
class label.  Everything is checked as early as it is cheap to: the labels and the size of every PNG when the
source is opened, the rest of an image when it is read.  :mod:`fdm_jax.data.opening` finds the source for a name or path;
shuffling and batching are the part of :mod:`fdm_jax.data.pipeline`.
"""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from fdm_jax.data import images as image_files
from fdm_jax.data.archives import Archive
from fdm_jax.data.labels import find_labels, read_labels
from fdm_jax.errors import UserError

# Larger archives have their PNG headers checked as images are read, not when opened (20 us each in a zip).
MAX_HEADERS_CHECKED = 100_000
# Threads or processes that read at the same time: beyond any use, and short of what a machine refuses to start.
MAX_READERS = 1024


@dataclasses.dataclass(frozen=True)
class DataSpec:
    """What a consumer must know about a source.

    Attributes:
      name: for logs and file names.
      num_images: N, mirrored copies included.
      resolution: height and width in pixels.
      channels: 1 (grey) or 3 (RGB).
      num_classes: of the names, or else the highest label plus one; 0 if unlabelled.
      class_names: one name per class, if known.
    """

    name: str
    num_images: int
    resolution: int
    channels: int
    num_classes: int
    class_names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        """cifar10, 50,000 images of 32x32x3, 10 classes (airplane, automobile, ...)"""
        text = f"{self.name}, {self.num_images:,} images of {self.resolution}x{self.resolution}x{self.channels}, "
        if not self.num_classes:
            return text + "no classes"
        names = self.class_names or ()
        if all(name.isdecimal() for name in names):
            return text + f"{self.num_classes} classes"
        return text + f"{self.num_classes} classes ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"


class Source(abc.ABC):
    """An indexable collection of images; safe to read from several threads and to pickle."""

    spec: DataSpec

    @abc.abstractmethod
    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Reads B images into new arrays: ``image`` uint8 [B, H, W, C], ``label`` int32 [B].

        Labels are 0 if there are none.

        Raises:
          UserError: an image file is missing, damaged or not like the others.
        """

    def __len__(self) -> int:
        return self.spec.num_images

    def in_order(self, size: int = 256, num: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The first ``num`` images, all by default, in batches of ``size`` and a smaller last one."""
        num = len(self) if num is None else num
        for start in range(0, num, size):
            yield self.read(np.arange(start, min(start + size, num)))


class FileSource(Source):
    """The image files of a zip or folder, sorted by name, with labels from ``dataset.json`` or folders if wanted.

    Raises:
      UserError: there are no images, the labels are not right, or images differ in size, are not square or
        neither grey nor RGB.
    """

    def __init__(self, archive: Archive, *, use_labels: bool = True):
        self._archive = archive
        files = archive.names()
        self._names = image_files.image_names(files)
        if not self._names:
            raise UserError(f"{archive.path} holds no image files: put some there, such as img00000000.png.")
        self._labels: np.ndarray = np.zeros(len(self._names), np.int32)
        class_names: tuple[str, ...] = ()
        if use_labels:
            found = find_labels(archive, files, self._names) or read_labels(archive, files, self._names)
            self._labels, class_names = found

        self._shape = image_files.ImageShape(*self._decode(0).shape)
        if self._shape.height != self._shape.width:
            raise UserError(
                f"{self._where(0)} is {self._shape}, but images must be square: `fdm dataset prepare folder "
                "--transform=center-crop` makes such a set."
            )
        self._check_headers()
        self.spec = DataSpec(
            name=archive.path.resolve().stem,
            num_images=len(self._names),
            resolution=self._shape.height,
            channels=self._shape.channels,
            num_classes=(len(class_names) or int(self._labels.max()) + 1) if use_labels else 0,
            class_names=class_names or None,
        )

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        images = np.empty((len(indices), *self._shape), np.uint8)
        for row, i in enumerate(indices):
            image = self._decode(i)
            self._check(i, image_files.ImageShape(*image.shape))
            images[row] = image
        return {"image": images, "label": self._labels[np.asarray(indices, np.int64)]}

    def _where(self, i: int) -> str:
        return f"{self._names[i]} in {self._archive.path}"

    def _decode(self, i: int) -> np.ndarray:
        return image_files.decode_image(self._archive.read(self._names[i]), self._where(i))

    def _check(self, i: int, shape: image_files.ImageShape) -> None:
        if shape != self._shape:
            raise UserError(
                f"{self._where(i)} is {shape}, but {self._names[0]} is {self._shape}: make them alike "
                "(`fdm dataset prepare folder --resolution=...` does)."
            )

    def _check_headers(self) -> None:
        if len(self._names) > MAX_HEADERS_CHECKED:
            return
        for i, name in enumerate(self._names):
            if name.lower().endswith(".png"):
                head = self._archive.read(name, image_files.PNG_HEADER_BYTES)
                shape = image_files.png_shape(head, self._where(i))
                if shape is None:  # a damaged file, or another kind of image under the wrong name
                    shape = image_files.ImageShape(*self._decode(i).shape)
                self._check(i, shape)


class Subset(Source):
    """A random choice of ``max_images`` images, in their old order; the same choice as EDM's ``max_size``.

    All of them if there are no more. ``num_classes`` stays that of the whole.
    """

    def __init__(self, inner: Source, max_images: int, seed: int = 0):
        if max_images < 1:
            raise UserError(f"max_images is {max_images}: it must be at least 1, or left out for all.")
        order = np.arange(len(inner))
        if len(inner) > max_images:
            np.random.RandomState(seed % 2**31).shuffle(order)
        self._inner, self._chosen = inner, np.sort(order[:max_images])
        self.spec = dataclasses.replace(inner.spec, num_images=len(self._chosen))

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        return self._inner.read(self._chosen[np.asarray(indices, np.int64)])


class XFlip(Source):
    """Every image twice: index N + i is image i mirrored left to right, with the same label."""

    def __init__(self, inner: Source):
        self._inner = inner
        self.spec = dataclasses.replace(inner.spec, num_images=2 * len(inner))

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        batch = self._inner.read(indices % len(self._inner))
        mirrored = indices >= len(self._inner)
        batch["image"][mirrored] = batch["image"][mirrored, :, ::-1]
        return batch


class Cached(Source):
    """Keeps every image once read, N*H*W*C bytes in all. A pickled copy starts empty."""

    def __init__(self, inner: Source):
        self._inner, self.spec = inner, inner.spec
        self._allocate()

    def _allocate(self) -> None:
        n, size = len(self._inner), self.spec.resolution
        self._images = np.empty((n, size, size, self.spec.channels), np.uint8)  # takes memory as it is filled
        self._labels = np.empty(n, np.int32)
        self._known = np.zeros(n, bool)
        self._lock = threading.Lock()

    def read(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        with self._lock:
            missing = np.unique(indices[~self._known[indices]])
        if missing.size:
            # Outside the lock, so that threads decode in parallel; should two read the same image, no harm.
            batch = self._inner.read(missing)
            with self._lock:
                self._images[missing], self._labels[missing] = batch["image"], batch["label"]
                self._known[missing] = True
        return {"image": self._images[indices], "label": self._labels[indices]}

    def __getstate__(self) -> dict[str, object]:
        return {"_inner": self._inner, "spec": self.spec}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._allocate()
