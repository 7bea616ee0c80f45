"""CIFAR-10 as its authors ship it: ``cifar-10-python.tar.gz``, ``cifar-10-binary.tar.gz``, or either one unpacked.

The pickles of the Python version are read with an unpickler that knows NumPy arrays and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.data.archives import check_growth, check_member
from fdm_jax.data.raw import ArraySplit, RawData
from fdm_jax.errors import UserError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_PIXELS = 3 * 32 * 32
_MAX_BYTES = 2**27  # of one batch; they have 31 MB


def read_cifar10(path: Path) -> RawData:
    """Both splits, in the authors' order, in memory (180 MB).

    Raises:
      UserError: it is not CIFAR-10 in one of its three forms, or it is cut short or damaged.
    """
    wanted = [name for names in BATCHES.values() for name in names]
    if not path.exists():
        raise UserError(f"no file or folder is at {path}: give the path of cifar-10-python.tar.gz.")
    found, checksum = (_from_folder if path.is_dir() else _from_tar)(path, {*wanted, *(f"{n}.bin" for n in wanted)})
    binary = any(name.endswith(".bin") for name in found)
    splits = {}
    for split, names in BATCHES.items():
        batches = []
        for name in names:
            file = f"{name}.bin" if binary else name
            if file not in found:
                raise UserError(f"{file} is missing from {path}, so this is not the whole of CIFAR-10.")
            batches.append((_parse_binary if binary else _parse_pickle)(found.pop(file), f"{file} in {path}"))
        pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = ArraySplit(np.ascontiguousarray(images), labels)
    return RawData(splits, 32, 3, 10, CLASS_NAMES, lambda: checksum)


def _from_folder(path: Path, wanted: set[str]) -> tuple[dict[str, bytes], str]:
    inner = [path / name for name in ("cifar-10-batches-py", "cifar-10-batches-bin") if (path / name).is_dir()]
    found = {}
    try:
        for name in sorted(wanted):
            file = (inner[0] if inner else path) / name
            if file.is_file() and file.stat().st_size <= _MAX_BYTES:
                found[name] = file.read_bytes()
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
    digests = b"".join(hashlib.sha256(found[name]).digest() for name in sorted(found))
    return found, hashlib.sha256(digests).hexdigest()


def _from_tar(path: Path, wanted: set[str]) -> tuple[dict[str, bytes], str]:
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member, name in _members(tar, path):
                if name in wanted and member.size <= _MAX_BYTES:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
            assert tar.fileobj is not None
            padding = 0
            while rest := tar.fileobj.read(2**20):  # up to the checksum of gzip, which stands at its end
                padding += len(rest)
                check_growth(padding, path)
        with path.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # the system's, and none of gzip's
            raise UserError(f"{path} cannot be read ({error.strerror}).") from error
        reason = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
        raise UserError(
            f"{path} cannot be read to its end ({reason}): it is cut short, damaged or no tar file; "
            "copy it again from where you have it."
        ) from error
    return found, digest


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Plain files and their last names; sizes are judged before anything is unpacked."""
    seen: set[str] = set()
    total = 0
    while (member := tar.next()) is not None:
        check_member(member.name, path, seen)
        total += member.size
        check_growth(total, path)
        if member.isfile():
            yield member, member.name.rsplit("/", 1)[-1]


class _ArrayUnpickler(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and NumPy arrays; any other class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encode,
        }
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _empty_array
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data set needs")
        return allowed[module, name]


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into old pickles."""
    return text.encode("latin1")


def _empty_array(kind: type, shape: object, dtype: object) -> np.ndarray:
    """NumPy makes an empty array first, and fills it with the state that follows."""
    return np.empty(0, np.uint8)


def _parse_pickle(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = content[b"data"], content[b"labels"]
    except Exception as error:  # damaged pickles make the unpickler raise nearly anything
        reason = " ".join(str(error).split())
        raise UserError(f"{where} is not a batch of CIFAR-10, or a damaged one ({reason}).") from error
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise UserError(f"{where} has no array of {_PIXELS} bytes per image, so it is not a batch of CIFAR-10.")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(type(i) is int for i in labels):
        raise UserError(f"{where} has no list of {len(pixels)} labels, one for each of its images.")
    return pixels, _checked(np.array(labels, np.int64), where)


def _parse_binary(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    if len(data) % (1 + _PIXELS) or not data:
        raise UserError(f"{where} has {len(data):,} bytes, no multiple of {1 + _PIXELS:,}: it is cut short or damaged.")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 1:], _checked(rows[:, 0], where)


def _checked(labels: np.ndarray, where: str) -> np.ndarray:
    bad = np.flatnonzero((labels < 0) | (labels >= len(CLASS_NAMES)))
    if len(bad):
        raise UserError(f"{where} gives image {bad[0]} the label {labels[bad[0]]}: labels go from 0 to 9.")
    return labels.astype(np.int32)
