"""The train step on many devices: ``jax.jit`` over a mesh, or ``jax.pmap`` on request.

Both take and give the same canonical state (one logical copy), so checkpoints know nothing of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdm_jax.errors import UserError, nearest
from fdm_jax.training.step import Metrics, TrainState

AXIS = "batch"
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a run uses its devices.

    Attributes:
      step: the compiled step; it consumes (donates) the state that it is given.
      put_state: canonical state -> what ``step`` takes.
      put_batch: this process's rows of a batch, NumPy arrays [B / processes, ...] -> what ``step`` takes.
      get_state: what ``step`` gives -> canonical state.
      get_metrics: the metrics that ``step`` gives -> scalars.
    """

    step: Step
    put_state: Callable[[TrainState], Any]
    put_batch: Callable[[Mapping[str, np.ndarray]], Any]
    get_state: Callable[[Any], TrainState]
    get_metrics: Callable[[Any], Metrics]


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices along the one axis "batch"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def sharded(mesh: Mesh) -> NamedSharding:
    """Rows are dealt to the devices in order."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def jit_over_mesh(make_step: Callable[[str | None], Step], mesh: Mesh) -> Parallel:
    """One program over the mesh: the batch sharded, the state replicated and donated."""
    rows, whole = sharded(mesh), replicated(mesh)
    step = jax.jit(make_step(None), in_shardings=(whole, rows), out_shardings=(whole, whole), donate_argnums=0)

    def put_batch(batch: Mapping[str, np.ndarray]) -> Any:
        return {key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()}

    return Parallel(step, lambda state: jax.device_put(state, whole), put_batch, lambda s: s, lambda m: m)


def pmap_over_devices(make_step: Callable[[str | None], Step], mesh: Mesh) -> Parallel:
    """``jax.pmap`` of the same step: a leading axis of devices on state and batch, gradients summed by name.

    For one process: a state is put on this process's devices alone.
    """
    if jax.process_count() > 1:
        raise UserError("parallel=pmap runs in one process only; use parallel=jit for several.")
    devices = list(mesh.devices.flat)
    step = jax.pmap(make_step(AXIS), axis_name=AXIS, devices=devices, donate_argnums=0)

    def put_state(state: TrainState) -> Any:
        # Through the host: the copies must not share a buffer with each other or with the canonical state.
        host = jax.device_get(state)
        stacked = jax.tree.map(lambda a: np.broadcast_to(a, (len(devices), *np.shape(a))), host)
        return jax.device_put(stacked, sharded(mesh))

    def put_batch(batch: Mapping[str, np.ndarray]) -> Any:
        return {
            key: jax.device_put(value.reshape(len(devices), -1, *value.shape[1:]), sharded(mesh))
            for key, value in batch.items()
        }

    def first(tree: Any) -> Any:
        return jax.tree.map(lambda a: a[0], tree)

    return Parallel(step, put_state, put_batch, lambda s: jax.device_put(first(s), replicated(mesh)), first)


MODES: dict[str, Callable[[Callable[[str | None], Step], Mesh], Parallel]] = {
    "jit": jit_over_mesh,
    "pmap": pmap_over_devices,
}


def parallelise(mode: str, make_step: Callable[[str | None], Step], mesh: Mesh) -> Parallel:
    """Run ``make_step(axis_name)`` on the mesh's devices in the given mode, "jit" or "pmap".

    Raises:
      UserError: an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"There is no parallel mode {mode!r}: {nearest(mode, MODES)}")
    return MODES[mode](make_step, mesh)
