"""MNIST and its relatives: idx files such as ``train-images-idx3-ubyte.gz``, as MNIST's authors define them."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from fdm_jax.data.raw import ArraySplit, RawData
from fdm_jax.errors import UserError

_FILE = re.compile(r"(.*?)(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_MAX_BYTES = 2**30


def read_idx(path: Path, resolution: int | None = None) -> RawData:
    """Grey images with labels, in memory.

    Args:
      path: a folder with the four files (``t10k`` or ``test`` may be missing), packed or not.
      resolution: images are put in the middle of zeros; 32 for MNIST's 28x28 by default, as in EDM's tool, because
        the U-Nets halve them.

    Raises:
      UserError: a file is missing, of another kind, cut short or damaged; or the resolution is too small.
    """
    if not path.is_dir():
        raise UserError(f"no folder is at {path}: give one that holds train-images-idx3-ubyte.gz and the others.")
    files = _find(path)
    splits, digests, size = {}, [], 0
    for split in ("train", "test"):
        if (split, "images") not in files and split == "test":
            continue
        arrays = []
        for kind, dims in (("images", 3), ("labels", 1)):
            if (split, kind) not in files:
                raise UserError(
                    f"{path} has no {split} {kind}: a file such as train-{kind}-idx{dims}-ubyte is missing."
                )
            array, digest = _read(files[split, kind], dims)
            arrays.append(array)
            digests.append(digest)
        images, labels = arrays
        if len(images) != len(labels) or not len(images):
            raise UserError(f"{path} has {len(images):,} {split} images and {len(labels):,} labels.")
        _, height, width = images.shape
        if height != width or not height or size not in (0, height):
            raise UserError(
                f"{files[split, 'images']} has images of {width}x{height}: all must be square, alike and not empty."
            )
        size = height
        splits[split] = ArraySplit(_pad(images, resolution or (32 if size == 28 else size)), labels.astype(np.int32))
    classes = max(int(split.labels.max()) for split in splits.values() if split.labels is not None) + 1
    checksum = hashlib.sha256(b"".join(digests)).hexdigest()
    return RawData(splits, splits["train"].read(0).shape[0], 1, classes, (), lambda: checksum)


def _find(path: Path) -> dict[tuple[str, str], Path]:
    found: dict[tuple[str, str], Path] = {}
    prefixes = set()
    for file in sorted(path.iterdir()):
        if match := _FILE.fullmatch(file.name):
            key = ("train" if match[2] == "train" else "test"), match[3]
            prefixes.add(match[1])
            if len(prefixes) > 1 or key in found:
                other = found.get(key, next(iter(found.values())))
                raise UserError(
                    f"{path} holds both {other.name} and {file.name}: leave the files of one data set there."
                )
            found[key] = file
    return found


def _read(path: Path, dims: int) -> tuple[np.ndarray, bytes]:
    try:
        whole = path.read_bytes()
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes([0, 0, 8, dims]):
                raise UserError(f"{path} is not an idx file of bytes in {dims} dimension(s).")
            shape = struct.unpack(f">{dims}I", head[4:])
            count = int(np.prod(shape, dtype=object))
            if count > _MAX_BYTES:
                raise UserError(f"{path} claims {count:,} bytes: it is not to be trusted, or too large.")
            data = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:  # the system's, and none of gzip's
            raise UserError(f"{path} cannot be read ({error.strerror}).") from error
        raise UserError(f"{path} cannot be read to its end ({error}): it is cut short or damaged.") from error
    if len(data) != count:
        raise UserError(
            f"{path} holds {'more' if len(data) > count else 'fewer'} bytes than the {count:,} it announces."
        )
    return np.frombuffer(data, np.uint8).reshape(shape), hashlib.sha256(whole).digest()


def _pad(images: np.ndarray, resolution: int) -> np.ndarray:
    n, size, _ = images.shape
    if resolution < size:
        raise UserError(f"--resolution is {resolution}, but the images have {size}: they are framed, not scaled.")
    before = (resolution - size) // 2
    out = np.zeros((n, resolution, resolution, 1), np.uint8)
    out[:, before : before + size, before : before + size, 0] = images
    return out
