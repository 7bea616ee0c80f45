"""Arrays on many devices, of one process or of several.

A mesh has one axis, over which the rows of a batch are dealt.  Where it spans several processes, each of them calls
these functions with the same arguments, as it runs the same programs.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"

# Platforms whose devices are the host's own processor.
ON_HOST = ("cpu",)

T = TypeVar("T")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices along the one axis "batch"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Rows are dealt to the devices in order."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays that every process holds whole, as arrays of that sharding; each process sends its own part only."""

    def place(array: Any) -> jax.Array:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, sharding)  # spread over the processes already
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(place, tree)


def in_batches(size: int, *arrays: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Rows of arrays [N, ...] in batches of one size, so that programs are compiled once.

    Yields:
      How many rows are new, and [size, ...] of each array, where the last batch is filled up with the last row.
    """
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        rows = len(parts[0])
        yield rows, [np.pad(part, [(0, size - rows)] + [(0, 0)] * (part.ndim - 1), mode="edge") for part in parts]


def checked(jitted: Any, check: Callable[[jax.stages.Compiled], None] | None) -> Callable[..., Any]:
    """A jitted function whose program is given to ``check`` once, compiled, before it first runs; None for no check."""
    unchecked = [] if check is None else [check]

    def call(*args: Any) -> Any:
        if unchecked:  # the call below finds it compiled
            unchecked[0](jitted.lower(*args).compile())
            unchecked.clear()
        return jitted(*args)

    return call


def sent_ahead(sent: Iterable[T], mesh: Mesh) -> Iterator[T]:
    """What is sent to the devices, each item when the next one has been sent: they work while the host deals with the last.

    On CPUs, where both are one, each item by itself: two at once would only take twice the memory.
    """
    waiting: collections.deque[T] = collections.deque()
    for item in sent:
        waiting.append(item)
        if len(waiting) > (mesh.devices.flat[0].platform not in ON_HOST):
            yield waiting.popleft()
    yield from waiting


def one_copy_per_process(tree: Any) -> Any:
    """Arrays that all their devices hold whole, as held by the first device of each process; nothing is copied."""

    def thin(array: jax.Array) -> jax.Array:
        devices: list[Any] = sorted(array.sharding.device_set, key=lambda device: device.id)
        firsts = {device.process_index: device for device in reversed(devices)}
        if not array.is_fully_replicated or len(firsts) == len(devices):
            return array
        own = next(s.data for s in array.addressable_shards if s.device is firsts[jax.process_index()])
        if len(firsts) == 1:
            return own
        mesh = make_mesh([firsts[process] for process in sorted(firsts)])
        return jax.make_array_from_single_device_arrays(array.shape, replicated(mesh), [own])

    return jax.tree.map(thin, tree)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole of an array on the host, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)
