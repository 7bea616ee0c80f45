"""Reads `network-snapshot-*.pkl` of the FDM and EDM repositories without running anything that they carry.

Such a file is a pickle of {"ema": ..., "loss_fn": ..., "augment_pipe": ..., "dataset_kwargs": ...}.  Each of its objects
was written as a call of `torch_utils.persistence._reconstruct_persistent_obj` on a description: the name of its class,
its state, and the source code of its class, which the original executes.  Here the description is all that is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import mmap
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.interop.pickles import PlainUnpickler, Record
from fdm_jax.storage_errors import system_fails

MAX_VERSION = 6  # of the original's torch_utils.persistence
_MAX_DEPTH = 16  # of modules in modules; the networks have 4
_MAX_NAME = 200  # letters in the name of a module or a parameter; the networks' have 20
_MAX_GROWTH = 8  # what is made of a file, in its sizes; storage, tensor and parameter in float32 of bfloat16: 6
_CONTAINERS = tuple(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential"))
_FLOATS = {"FloatStorage": "f4", "HalfStorage": "f2", "DoubleStorage": "f8", "BFloat16Storage": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Persistent:
    """An object of the original, as far as a snapshot describes it.

    Attributes:
      class_name: such as ``FDM_EDMPrecond``.
      state: its attributes.
    """

    class_name: str
    state: Mapping[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """What its constructor was called with, by keyword."""
        return dict(_dict(self.state.get("_init_kwargs"), f"the arguments of {self.class_name}"))


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A snapshot's parts.

    Attributes:
      ema: the preconditioned network.
      loss, augment: what it was trained with, if the file says so.
    """

    ema: Persistent
    loss: Persistent | None
    augment: Persistent | None


def read_snapshot(path: Path, load_storage: Callable[[bytes], np.ndarray] | None = None) -> Snapshot:
    """Reads a snapshot file.

    Args:
      path: the file.
      load_storage: from the bytes of a tensor's storage, as ``torch.save`` writes them, to a flat array; by default
        :func:`torch_storage`.

    Raises:
      UserError: there is no such file, torch is missing, or the file is no snapshot, damaged, cut short, or asks for
        something that no snapshot needs.
    """
    load_storage = torch_storage if load_storage is None else load_storage
    with _mapped(path) as file:
        try:
            most = _MAX_GROWTH * len(file)
            content = PlainUnpickler(file, _functions(load_storage), _CONTAINERS, most).load()
        except MissingTorch:
            raise
        except UserError as error:
            raise UserError(f"{path} is not a snapshot that can be read: {error}.") from error
        except Exception as error:  # a damaged pickle makes its reader raise nearly anything
            if system_fails(error):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            raise UserError(f"{path} is not a snapshot, or a damaged or incomplete one ({reason}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("ema"), Persistent):
        raise UserError(f'{path} is a pickle, but has no network under "ema": it is not a snapshot of FDM or EDM.')
    others = (content.get(name) for name in ("loss_fn", "augment_pipe"))
    return Snapshot(content["ema"], *(value if isinstance(value, Persistent) else None for value in others))


def tensors(module: Persistent) -> dict[str, np.ndarray]:
    """All parameters and buffers below a module, under the names of its state dict.

    Raises:
      UserError: what should be a module or tensor is none, or a module occurs twice.
    """
    found: dict[str, np.ndarray] = {}
    seen: set[int] = set()

    def walk(node: Any, prefix: str, depth: int) -> None:
        if node is None:
            return
        state = node.state if isinstance(node, (Persistent, Record)) else None
        if not isinstance(state, dict) or id(node) in seen or depth > _MAX_DEPTH:
            raise UserError(f"{prefix.rstrip('.') or 'the network'} is not a module of its own.")
        seen.add(id(node))
        for group in ("_parameters", "_buffers"):
            for name, value in _dict(state.get(group), prefix + group).items():
                if isinstance(value, np.ndarray):
                    found[f"{prefix}{name}"] = value
                elif value is not None:
                    raise UserError(f"{prefix}{name} is not a tensor.")
        for name, child in _dict(state.get("_modules"), prefix + "_modules").items():
            walk(child, f"{prefix}{name}.", depth + 1)

    walk(module, "", 0)
    return found


def submodule(module: Persistent, name: str) -> Persistent | None:
    """A direct part of a module, None if it has none of that name."""
    found = _dict(module.state.get("_modules"), "_modules").get(name)
    return found if isinstance(found, Persistent) else None


def _dict(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) and len(key) <= _MAX_NAME for key in value):
        raise UserError(f"{what} is not a dictionary of names.")
    return value


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """The file in memory as it is asked for; reading more than it has is harmless."""
    try:
        with path.open("rb") as file:
            try:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise UserError(f"{path} is empty: it is not a snapshot.") from error
            with mapped:
                if mapped[:2] == b"PK":
                    raise UserError(
                        f"{path} is a zip, perhaps a training state or another file of torch.save, and not a snapshot "
                        "(network-snapshot-*.pkl)."
                    )
                yield mapped
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give the path of a network-snapshot-*.pkl."
        ) from error


def _functions(load_storage: Callable[[bytes], np.ndarray]) -> dict[str, Callable[..., Any]]:
    """What a snapshot may call, and what is called in its place."""

    def load(data: Any) -> np.ndarray:
        if not isinstance(data, bytes):
            raise UserError("a tensor has no bytes")
        _check_claim(data)
        return load_storage(data)

    return {
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
        "collections.OrderedDict": _ordered_dict,
        "dnnlib.util.EasyDict": _ordered_dict,
        "builtins.set": _set,
        "__builtin__.set": _set,
        "_codecs.encode": _encode,
        "torch._utils._rebuild_parameter": lambda data, *_: data,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor": _tensor,
        "torch.storage._load_from_bytes": load,
        "numpy.dtype": _dtype,
        "numpy.core.multiarray.scalar": _scalar,
        "numpy._core.multiarray.scalar": _scalar,
    }


def _persistent(meta: Any) -> Persistent:
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise UserError("an object in it is described in an unknown way")
    version, name = meta.get("version"), meta.get("class_name")
    if type(version) is not int or not 1 <= version <= MAX_VERSION:
        raise UserError(f"an object in it is of version {reprlib.repr(version):.20}, and 1 to {MAX_VERSION} are known")
    if not isinstance(name, str):
        raise UserError("an object in it has no class")
    return Persistent(name, meta["state"])  # meta["module_src"], the code, is not looked at


def _ordered_dict(items: Any = ()) -> dict[Any, Any]:
    if not isinstance(items, (list, tuple, dict)):
        raise UserError("it makes a dictionary in an unknown way")
    made: dict[Any, Any] = {}
    PlainUnpickler._put(made, [each for pair in (items.items() if isinstance(items, dict) else items) for each in pair])
    return made


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list) or not all(isinstance(item, (str, int)) for item in items):
        raise UserError("it makes a set in an unknown way")
    return set(items)


def _encode(text: Any, encoding: Any) -> bytes:
    """How Python 3 writes bytes where the protocol has none."""
    if not isinstance(text, str):
        raise UserError("it makes bytes in an unknown way")
    return text.encode("latin1")


def _dtype(code: Any, *_: Any) -> Record:
    return Record("numpy.dtype", code)


def _scalar(dtype: Any, data: Any) -> float | int | bool:
    # The byte order, which comes in the state that follows, is that of the machine: all of them are little-endian.
    code = dtype.code if isinstance(dtype, Record) else None
    kind = {"f8": "<f8", "f4": "<f4", "i8": "<i8", "i4": "<i4", "b1": "?"}.get(code) if isinstance(code, str) else None
    if kind is None or not isinstance(data, bytes) or len(data) != np.dtype(kind).itemsize:
        raise UserError("a number in it is of an unknown type")
    return np.frombuffer(data, kind)[0].item()


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """A view of a storage; what it claims is checked against what the storage holds."""
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else (None,)
    if not isinstance(storage, np.ndarray) or storage.ndim != 1 or not all(type(n) is int and n >= 0 for n in numbers):
        raise UserError("a tensor in it is described in an unknown way")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if len(size) > 8 or math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
        raise UserError(f"a tensor in it claims the shape {list(size[:8])}, but has {len(storage)} numbers")
    if not math.prod(size):
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


class MissingTorch(UserError):
    """torch is not installed."""


def import_torch(purpose: str) -> Any:
    """The module, for those who come from PyTorch or go there.

    Raises:
      MissingTorch: it is not installed; the sentence says what for, and how to get it.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingTorch(
            f"To {purpose}, torch must be installed: pip install torch (the build for CPUs does), or "
            'pip install "fdm_jax[torch]".'
        ) from error
    return torch


def torch_storage(data: bytes) -> np.ndarray:
    """The numbers of a storage that ``torch.save`` wrote in its old format, flat.

    Raises:
      MissingTorch: torch is not installed.
    """
    torch = import_torch("read a PyTorch snapshot")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that typed storages are deprecated
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        flat = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    return (flat.float() if flat.dtype == torch.bfloat16 else flat).numpy()


def _check_claim(data: bytes) -> None:
    """Refuse storage bytes that announce more numbers than they hold: torch would set the memory aside first."""
    file = io.BytesIO(data)
    types = {f"torch.{name}": name for name in _FLOATS}
    claims: list[tuple[Any, ...]] = []

    class Header(PlainUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            if f"{module}.{name}" in types:
                return name
            raise UserError(f"a tensor's bytes ask for {module}.{name:.60}, which no tensor needs")

        def persistent_load(self, pid: Any) -> Any:
            claims.append(pid)
            return None

    for _ in range(4):  # magic number, protocol, description of the machine, the storage
        Header(file, {}).load()
    if len(claims) != 1 or type(claims[0]) is not tuple or len(claims[0]) != 6:
        raise UserError("a tensor's bytes do not describe one storage")
    kind, storage, _, _, count, view = claims[0]
    if kind != "storage" or storage not in _FLOATS or type(count) is not int or view is not None:
        raise UserError("a tensor's bytes describe it in an unknown way")
    if not 0 <= count <= len(data):
        raise UserError(f"a tensor claims {count:,} numbers in {len(data):,} bytes")
