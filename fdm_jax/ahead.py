"""The train step compiled for a TPU slice or GPUs that are not at hand: that it compiles, and whether it fits.

The compiler is that of the devices themselves (libtpu, or XLA in JAX's plugin for CUDA), and needs none: it is given
shapes, and a description of the devices.
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

from fdm_jax.accounting import ACCELERATORS
from fdm_jax.devices import AXIS, make_mesh
from fdm_jax.errors import UserError, memory_full, nearest
from fdm_jax.experiment import Experiment
from fdm_jax.training.step import init_state
from fdm_jax.xla_flags import has_cuda_plugin

# How Cloud TPU lays out so many chips: in a plane, or in space.
PLANES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
BLOCKS = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}

# Accelerator type -> what JAX calls the slice.  The number in a type counts chips, or the cores of v4, v5p and TPU7x, which
# have two to a chip: one device on v4 and v5p, and two on TPU7x.
SLICES = {
    **{f"v5litepod-{chips}": f"v5e:{shape}" for chips, shape in PLANES.items()},  # as gcloud calls it
    **{f"v5e-{chips}": f"v5e:{shape}" for chips, shape in PLANES.items()},  # as everybody does
    **{f"v6e-{chips}": f"v6e:{shape}" for chips, shape in PLANES.items()},
    **{f"v4-{2 * chips}": f"v4:{shape}" for chips, shape in BLOCKS.items()},
    **{f"v5p-{2 * chips}": f"v5p:{shape}" for chips, shape in BLOCKS.items()},
    **{f"tpu7x-{2 * chips}": f"tpu7x:{shape}" for chips, shape in BLOCKS.items()},
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about an NVIDIA GPU, by NVIDIA's data sheets.

    Attributes:
      capability: compute capability, of those in :data:`PER_MULTIPROCESSOR`.
      multiprocessors: how many.
      clock_ghz: at most.
      gb_per_second: of memory.
      l2_mib: cache.
    """

    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    gb_per_second: int
    l2_mib: int


# By their names in fdm_jax.accounting.ACCELERATORS.  (CUDA 13 has left V100 and older ones behind.)
GPUS = {
    "t4": Gpu((7, 5), 40, 1.59, 320, 4),
    "l4": Gpu((8, 9), 58, 2.04, 300, 48),
    "l40s": Gpu((8, 9), 142, 2.52, 864, 96),
    "a6000": Gpu((8, 6), 84, 1.80, 768, 6),
    "rtx3090": Gpu((8, 6), 82, 1.70, 936, 6),
    "rtx4090": Gpu((8, 9), 128, 2.52, 1008, 72),
    "rtx5090": Gpu((12, 0), 170, 2.41, 1792, 96),
    "a100": Gpu((8, 0), 108, 1.41, 2039, 40),
    "a100-40": Gpu((8, 0), 108, 1.41, 1555, 40),
    "h100": Gpu((9, 0), 132, 1.98, 3350, 50),
    "h200": Gpu((9, 0), 132, 1.98, 4800, 60),
    "b200": Gpu((10, 0), 148, 1.97, 8000, 126),
}

# Compute capability -> float32 units, threads, KiB of shared memory, and KiB of it that one block can have (CUDA C++
# Programming Guide, "Compute Capabilities").
PER_MULTIPROCESSOR = {
    (7, 5): (64, 1024, 64, 64),
    (8, 0): (64, 2048, 164, 163),
    (8, 6): (128, 1536, 100, 99),
    (8, 9): (128, 1536, 100, 99),
    (9, 0): (128, 2048, 228, 227),
    (10, 0): (128, 2048, 228, 227),
    (12, 0): (128, 1536, 100, 99),
}
CUDNN = (9, 12)  # its version, which XLA also asks for: what JAX's plugins need at least

# For devices of a platform that are absent: matrix products by cuBLAS, as XLA's own kernels for them come in sizes that
# are tried out on the GPU, and the first may be none that fits.
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a train step.

    Attributes:
      argument_bytes: of state and batch, on each device.
      temporary_bytes: that it sets aside beside them, on each device.
      all_reduces: sums over the devices in one step; XLA may cut or join those that were asked for.  None where it does
        not show its program (for GPUs, in jax 0.7).
      seconds: that tracing and compiling took.
    """

    argument_bytes: int
    temporary_bytes: int
    all_reduces: int | None
    seconds: float


class DoesNotFit(Exception):
    """The compiler finds no place for a program in a device's memory; the message is its own first sentence."""


def accelerator_of(name: str) -> tuple[str, int]:
    """Name in :data:`~fdm_jax.accounting.ACCELERATORS` and number of devices.

    Args:
      name: of a TPU slice, such as "v5litepod-16", or of GPUs in one machine, such as "h100" or "8xh100".

    Raises:
      UserError: there is nothing of that name.
    """
    if name in SLICES:
        generation, shape = SLICES[name].split(":")
        chips = {shape: chips for layout in (PLANES, BLOCKS) for chips, shape in layout.items()}
        if generation == "tpu7x":
            return generation, 2 * chips[shape]
        return f"tpu-{generation}", chips[shape]
    gpus = re.fullmatch(r"(?:([1-9]\d{0,2})x)?(.+)", name)
    if gpus and gpus[2] in GPUS:
        return gpus[2], int(gpus[1] or 1)
    known = [*SLICES, *GPUS, *(f"8x{gpu}" for gpu in GPUS)]
    raise UserError(f"There is no TPU slice or GPU {name!r} to compile for: {nearest(name, known)}")


def absent_devices(name: str) -> list[Any]:
    """Descriptions of devices, to compile for; their names are those of :func:`accelerator_of`.

    For a process that does nothing else, and has done nothing with JAX yet: it sets what libtpu reads from the environment
    when it is loaded, keeps JAX from taking GPUs that are there, and turns JAX's cache of compiled programs off.

    Raises:
      UserError: there is nothing of that name, or its compiler is not installed.
    """
    accelerator, count = accelerator_of(name)
    # JAX writes a program for absent devices into its cache, but cannot read it back.
    jax.config.update("jax_enable_compilation_cache", False)
    return _gpus(accelerator, count) if accelerator in GPUS else _slice(name, count)


def _gpus(accelerator: str, count: int) -> list[Any]:
    if not has_cuda_plugin():
        raise UserError(
            f"To compile for {accelerator} takes JAX's plugin for NVIDIA GPUs, which is not installed: "
            "pip install '.[cuda12]' (Linux), or leave --compile-for away."
        )
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # of drivers, which need not be there
    description = gpu_description(accelerator)
    topology = topologies.get_topology_desc("", "cuda", target_config=description, topology=f"1x1x{count}")
    return list(topology.devices)


def gpu_description(accelerator: str) -> str:
    """One of :data:`GPUS` as XLA wants it: a GpuTargetConfigProto (xla/stream_executor/device_description.proto), as text."""
    gpu = GPUS[accelerator]
    units, threads, shared, shared_of_block = PER_MULTIPROCESSOR[gpu.capability]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_core": shared * 2**10,
        "shared_memory_per_block_optin": shared_of_block * 2**10,
        "threads_per_core_limit": threads,
        "core_count": gpu.multiprocessors,
        "fpus_per_core": units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": gpu.gb_per_second * 10**9,
        "l2_cache_size": gpu.l2_mib * 2**20,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": round(ACCELERATORS[accelerator].memory_gib * 2**30),
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    major, minor = gpu.capability
    return "\n".join([
        "gpu_device_info {",
        *(f"  {field}: {value}" for field, value in device.items()),
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
        "}",
        'platform_name: "CUDA"',
        f"dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} }}",
        f'device_description_str: "{ACCELERATORS[accelerator].title}"',
    ])  # fmt: skip


def _slice(accelerator_type: str, count: int) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"To compile for {accelerator_type} takes libtpu, the TPU's compiler, which is not installed: "
            "pip install '.[tpu]' (Linux on x86), or leave --compile-for away."
        )
    # Or libtpu would ask Google Cloud's metadata server what it runs on, and wait for the answer.
    told = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": accelerator_type}
    os.environ.update({"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", **told, **os.environ})
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
      UserError: see :func:`lower_step`; or cuDNN's attention is asked for, which JAX compiles where the GPU is.
      DoesNotFit: see there.
    """
    if experiment.network.attention == "cudnn":
        raise UserError(
            "network.attention is 'cudnn', which cannot be compiled without the GPU: with --config.network.attention=auto a "
            "step takes about as much memory, or a little more."
        )
    start = time.perf_counter()
    lowered = lower_step(experiment, devices)
    try:
        compiled = lowered.compile(COMPILER_OPTIONS.get(devices[0].platform))
    except jax.errors.JaxRuntimeError as error:
        if (said := memory_full(error)) is None:
            raise
        raise DoesNotFit(f"{said}.") from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return CompiledStep(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        all_reduces=None if text is None else len(re.findall(r" all-reduce(?:-start)?\(", text)),
        seconds=time.perf_counter() - start,
    )
