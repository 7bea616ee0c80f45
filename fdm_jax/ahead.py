"""The train step compiled for a TPU slice that is not at hand: that it compiles, and whether it fits.

The compiler is that of the slice itself (libtpu), and needs no TPU: it is given shapes, and a description of the slice.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from fdm_jax.devices import AXIS, make_mesh
from fdm_jax.errors import UserError, nearest
from fdm_jax.experiment import Experiment
from fdm_jax.training.step import init_state

# How Cloud TPU lays out so many chips: in a plane, or in space.
PLANES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
BLOCKS = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}

# Accelerator type -> what JAX calls the slice.  The number in a type counts chips, or the cores of v4 and v5p, which have
# two to a chip and one to a device.
SLICES = {
    **{f"v5litepod-{chips}": f"v5e:{shape}" for chips, shape in PLANES.items()},
    **{f"v6e-{chips}": f"v6e:{shape}" for chips, shape in PLANES.items()},
    **{f"v4-{2 * chips}": f"v4:{shape}" for chips, shape in BLOCKS.items()},
    **{f"v5p-{2 * chips}": f"v5p:{shape}" for chips, shape in BLOCKS.items()},
}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a train step.

    Attributes:
      argument_bytes: of state and batch, on each device.
      temporary_bytes: that it sets aside beside them, on each device.
      all_reduces: sums over the devices in one step; XLA may cut or join those that were asked for.
      seconds: that tracing and compiling took.
    """

    argument_bytes: int
    temporary_bytes: int
    all_reduces: int
    seconds: float


class DoesNotFit(Exception):
    """The compiler finds no place for a program in a device's memory; the message is its own first sentence."""


def accelerator_of(accelerator_type: str) -> tuple[str, int]:
    """Name in :data:`~fdm_jax.accounting.ACCELERATORS` and number of devices of a slice such as "v5litepod-16".

    Raises:
      UserError: there is no such slice.
    """
    if accelerator_type not in SLICES:
        raise UserError(f"There is no TPU slice {accelerator_type!r}: {nearest(accelerator_type, SLICES)}")
    generation, shape = SLICES[accelerator_type].split(":")
    chips = {shape: chips for layout in (PLANES, BLOCKS) for chips, shape in layout.items()}
    return f"tpu-{generation}", chips[shape]


def slice_devices(accelerator_type: str) -> list[Any]:
    """Descriptions of a slice's chips, to compile for.

    For a process that does nothing else, and has done nothing with JAX yet: it sets what libtpu reads from the environment
    when it is loaded, and turns JAX's cache of compiled programs off.

    Raises:
      UserError: there is no such slice, or libtpu is not installed.
    """
    _, count = accelerator_of(accelerator_type)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"To compile for {accelerator_type} takes libtpu, the TPU's compiler, which is not installed: "
            "pip install '.[tpu]' (Linux on x86), or leave --compile-for away."
        )
    # Or libtpu would ask Google Cloud's metadata server what it runs on, and wait for the answer.
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": accelerator_type}
    os.environ.update({"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **told, **os.environ})
    # JAX writes a program for absent devices into its cache, but cannot read it back.
    jax.config.update("jax_enable_compilation_cache", False)
    name = SLICES[accelerator_type]
    settings: dict[str, Any] = {}
    if name.startswith(("v4", "v5p")):
        settings["chip_config_name"] = "megacore"  # two cores work as one device
    if count == 1:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **settings).devices)


def lower_step(experiment: Experiment, devices: list[Any], at_once: int = 1) -> Any:
    """The run's train step, or several as one program, for these devices: a ``jax.stages.Lowered``, from shapes alone.

    Raises:
      UserError: the batch cannot be dealt to the devices, or the run is one of ``parallel=pmap``.
    """
    experiment.check_devices(len(devices))
    if experiment.config.parallel == "pmap":
        raise UserError("parallel=pmap compiles for the devices of this process only; use parallel=jit or fsdp.")
    mesh, spec = make_mesh(devices), experiment.spec
    parallel = experiment.parallelised(mesh)

    def like(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    state = jax.eval_shape(lambda: init_state(experiment.network, spec, experiment.image_shape))
    state = jax.tree.map(like, state, parallel.state_sharding(state))
    rows = {"image": (experiment.image_shape, jnp.uint8), "label": ((), jnp.int32), "index": ((), jnp.int32)}
    stacked = (at_once,) if at_once > 1 else ()
    dealt = NamedSharding(mesh, PartitionSpec(*[None for _ in stacked], AXIS))
    batch = {
        key: jax.ShapeDtypeStruct((*stacked, spec.batch_size, *shape), dtype, sharding=dealt)
        for key, (shape, dtype) in rows.items()
    }
    step: Any = parallel.steps if stacked else parallel.step
    return step.lower(state, batch)


def compile_step(experiment: Experiment, devices: list[Any]) -> CompiledStep:
    """The run's train step, compiled for devices that need not exist.

    Raises:
      UserError: see :func:`lower_step`.
      DoesNotFit: see there.
    """
    start = time.perf_counter()
    lowered = lower_step(experiment, devices)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(str(error).split("RESOURCE_EXHAUSTED:")[-1].strip().splitlines()[0]) from error
    memory = compiled.memory_analysis()
    return CompiledStep(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        all_reduces=len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text())),
        seconds=time.perf_counter() - start,
    )
