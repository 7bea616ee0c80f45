"""The train step on many devices: data parallel by ``jax.jit`` or ``jax.pmap``, or with the state dealt out too.

All take and give the same canonical state (one logical copy), so checkpoints know nothing of devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fdm_jax.devices import AXIS, replicated, sharded
from fdm_jax.errors import UserError, nearest
from fdm_jax.training.axis import WHOLE, Axis
from fdm_jax.training.step import Metrics, TrainState
from fdm_jax.xla_flags import without_graphs

Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
MakeStep = Callable[[Axis], Step]
Batch = Mapping[str, np.ndarray]

# Arrays of fewer elements are held whole by every device: to gather one costs more than it takes.
LEAST_DEALT = 4096

# In which order an accelerator's convolutions want the axes of their kernels [H, W, in, out] in memory.  In another one
# they are transposed in every step, with their gradients, moments and averages: for CIFAR-10's network these are a fifth
# of the operations in XLA's program for an H200.  (Not tried with the state dealt out.)
KERNEL_LAYOUTS = {"gpu": Layout((3, 0, 1, 2))}


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a run uses its devices.

    Attributes:
      step: the compiled step; it consumes (donates) the state that it is given.
      steps: several steps as one program, of batches stacked along a new first axis; metrics [steps].
      state_sharding: shapes of a canonical state -> where each of its arrays lies.
      put_state: canonical state -> what ``step`` takes.
      put_batch: this process's rows of a batch, NumPy arrays [B / processes, ...] -> what ``step`` takes.
      put_batches: those of several batches -> what ``steps`` takes.
      get_state: what ``step`` gives -> canonical state.
      get_metrics: the metrics that ``step`` or ``steps`` gives -> scalars, or [steps].
    """

    step: Step
    steps: Step
    state_sharding: Callable[[Any], Any]
    put_state: Callable[[TrainState], Any]
    put_batch: Callable[[Batch], Any]
    put_batches: Callable[[Sequence[Batch]], Any]
    get_state: Callable[[Any], TrainState]
    get_metrics: Callable[[Any], Metrics]


def in_a_row(step: Step) -> Step:
    """The step for each of the batches in turn."""
    return lambda state, batches: jax.lax.scan(step, state, batches)


def jit_over_mesh(make_step: MakeStep, mesh: Mesh) -> Parallel:
    """One program over the mesh: the batch dealt out, the state whole on every device.

    Each device works on its own rows, and loss and gradients are summed over the devices once, after all rounds of
    accumulation.  (Left to itself, XLA would sum them in every round.)
    """
    whole = replicated(mesh)
    platform = mesh.devices.flat[0].platform
    layout = KERNEL_LAYOUTS.get(platform)

    def formats(state: Any) -> Any:
        """Where each array of a state lies, and the kernels in which order."""
        return jax.tree.map(lambda a: Format(layout, whole) if a.ndim == 4 else whole, state)

    def compiled(step: Step, rows: PartitionSpec, options: dict[str, str] | None = None) -> Any:
        # Unchecked, since the step's own psum is what makes its results alike on all devices.
        body = jax.shard_map(
            step, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(), check_vma=False
        )
        if layout is None:
            return jax.jit(body, donate_argnums=0, compiler_options=options)
        return _Formatted(body, formats, options)

    def with_kernels(order: Layout) -> Callable[[TrainState], TrainState]:
        # By a program: of several processes, none could put arrays that lie in all of them.
        copy = jax.jit(lambda kernel: kernel, out_shardings=Format(order, whole))
        return lambda state: jax.tree.map(lambda a: copy(a) if a.ndim == 4 else a, state)

    arranged = with_kernels(layout) if layout else lambda state: state
    canonical = with_kernels(Layout((0, 1, 2, 3))) if layout else lambda state: state

    return Parallel(
        step=compiled(make_step(Axis(AXIS)), PartitionSpec(AXIS), without_graphs(platform)),
        steps=compiled(in_a_row(make_step(Axis(AXIS))), PartitionSpec(None, AXIS)),
        state_sharding=lambda like: jax.tree.map(lambda _: whole, like),
        put_state=lambda state: arranged(jax.device_put(state, whole)),
        put_batch=_put_rows(mesh, PartitionSpec(AXIS)),
        put_batches=lambda batches: _put_rows(mesh, PartitionSpec(None, AXIS))(_stack(batches)),
        get_state=canonical,
        get_metrics=lambda metrics: metrics,
    )


class _Formatted:
    """A compiled step whose state, always of the same shapes, lies in memory as ``formats`` says; donated."""

    def __init__(self, step: Step, formats: Callable[[Any], Any], options: dict[str, str] | None):
        self._step, self._formats, self._options = step, formats, options
        self._jitted: Any = None

    def _of(self, state: Any) -> Any:
        if self._jitted is None:
            formats = self._formats(state)
            self._jitted = jax.jit(
                self._step,
                donate_argnums=0,
                in_shardings=(formats, None),
                out_shardings=(formats, None),
                compiler_options=self._options,
            )
        return self._jitted

    def __call__(self, state: Any, batch: Any) -> Any:
        return self._of(state)(state, batch)

    def lower(self, state: Any, batch: Any) -> Any:
        """As of a function that ``jax.jit`` gives."""
        return self._of(state).lower(state, batch)


def fsdp_over_mesh(make_step: MakeStep, mesh: Mesh) -> Parallel:
    """Parameters, average and optimiser are dealt to the devices too, for models that outgrow one (ZeRO, FSDP).

    Each device works on its own rows, with parameters that it gathers, and updates its part of the state with its part of
    the sums of the gradients.  (Left to itself, XLA for TPUs cuts convolutions into loops, to gather a part of the kernel
    while it computes with another one: by its own count of cycles CIFAR-10's step took 7.7 times as long.)
    """

    def compiled(rows: PartitionSpec, *, several: bool, options: dict[str, str] | None = None) -> Any:
        def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            specs = jax.tree.map(lambda sharding: sharding.spec, dealt(state, mesh))
            of_parts = make_step(Axis(AXIS, jax.tree.map(_cut, specs.params)))
            body = in_a_row(of_parts) if several else of_parts
            return jax.shard_map(
                body, mesh=mesh, in_specs=(specs, rows), out_specs=(specs, PartitionSpec()), check_vma=False
            )(state, batch)

        return jax.jit(step, donate_argnums=0, compiler_options=options)

    return Parallel(
        step=compiled(PartitionSpec(AXIS), several=False, options=without_graphs(mesh.devices.flat[0].platform)),
        steps=compiled(PartitionSpec(None, AXIS), several=True),
        state_sharding=lambda like: dealt(like, mesh),
        put_state=lambda state: jax.device_put(state, dealt(state, mesh)),
        put_batch=_put_rows(mesh, PartitionSpec(AXIS)),
        put_batches=lambda batches: _put_rows(mesh, PartitionSpec(None, AXIS))(_stack(batches)),
        get_state=lambda state: state,
        get_metrics=lambda metrics: metrics,
    )


def dealt(tree: Any, mesh: Mesh) -> Any:
    """Shardings that cut every large array along its longest axis that divides by the devices; the rest stays whole."""

    def one(array: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(array.shape) if size % mesh.size == 0]
        if array.size < LEAST_DEALT or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, AXIS))

    return jax.tree.map(one, tree)


def _cut(spec: PartitionSpec) -> int:
    """Which axis is dealt out, or WHOLE."""
    return tuple(spec).index(AXIS) if AXIS in spec else WHOLE


def _put_rows(mesh: Mesh, spec: PartitionSpec) -> Callable[[Batch], Any]:
    rows = NamedSharding(mesh, spec)
    return lambda batch: {key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()}


def _stack(batches: Sequence[Batch]) -> Batch:
    return {key: np.stack([batch[key] for batch in batches]) for key in batches[0]}


def pmap_over_devices(make_step: MakeStep, mesh: Mesh) -> Parallel:
    """``jax.pmap`` of the same step: a leading axis of devices on state and batch, gradients summed by name.

    For one process: a state is put on this process's devices alone.
    """
    if jax.process_count() > 1:
        raise UserError("parallel=pmap runs in one process only; use parallel=jit for several.")
    devices = list(mesh.devices.flat)

    def compiled(step: Step) -> Step:
        return jax.pmap(step, axis_name=AXIS, devices=devices, donate_argnums=0)

    def put_state(state: TrainState) -> Any:
        # Through the host: the copies must not share a buffer with each other or with the canonical state.
        host = jax.device_get(state)
        stacked = jax.tree.map(lambda a: np.broadcast_to(a, (len(devices), *np.shape(a))), host)
        return jax.device_put(stacked, sharded(mesh))

    def dealt_rows(value: np.ndarray) -> np.ndarray:
        return value.reshape(len(devices), -1, *value.shape[1:])

    def put_batch(batch: Batch) -> Any:
        return {key: jax.device_put(dealt_rows(value), sharded(mesh)) for key, value in batch.items()}

    def put_batches(batches: Sequence[Batch]) -> Any:
        return {
            key: jax.device_put(np.stack([dealt_rows(batch[key]) for batch in batches], axis=1), sharded(mesh))
            for key in batches[0]
        }

    def first(tree: Any) -> Any:
        # On the host: a[0] would be a program of its own, for which the host would wait behind the steps under way.
        parts = jax.device_get(jax.tree.map(lambda a: a.addressable_data(0), tree))
        return jax.tree.map(lambda a, part: part.reshape(a.shape[1:]), tree, parts)

    return Parallel(
        step=compiled(make_step(Axis(AXIS))),
        steps=compiled(in_a_row(make_step(Axis(AXIS)))),
        state_sharding=lambda like: jax.tree.map(lambda _: replicated(mesh), like),
        put_state=put_state,
        put_batch=put_batch,
        put_batches=put_batches,
        get_state=lambda state: jax.device_put(first(state), replicated(mesh)),
        get_metrics=first,
    )


MODES: dict[str, Callable[[MakeStep, Mesh], Parallel]] = {
    "jit": jit_over_mesh,
    "fsdp": fsdp_over_mesh,
    "pmap": pmap_over_devices,
}


def parallelise(mode: str, make_step: MakeStep, mesh: Mesh) -> Parallel:
    """Run ``make_step(axis)`` on the mesh's devices in the given mode, "jit", "fsdp" or "pmap".

    Raises:
      UserError: an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"There is no parallel mode {mode!r}: {nearest(mode, MODES)}")
    return MODES[mode](make_step, mesh)
