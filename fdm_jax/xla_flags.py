"""Flags of XLA's: one that releases of jaxlib need to be fast on CPUs, one against CUDA graphs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

# The first release with slow convolutions on CPUs, which is the last for Python 3.11, and the first that was not tried.
SLOW_CONVOLUTIONS = ((0, 10, 2), (0, 13))
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer"


def avoid_slow_convolutions() -> bool:
    """Have jaxlib 0.10.2 to 0.12 compute convolutions on CPUs with Eigen, as releases before did; returns whether it will.

    They give them to YNNPACK.  In 0.10.2 that takes 1.8 times as long for the 3x3 convolutions of a U-Net (measured with
    64 channels at 8x8 on a CPU with AVX-512).  In 0.11.2 and 0.12.0.1 it takes 1.5 times as long for the gradients of
    their kernels (256 channels at 32x32), and a train step 1.1 to 1.2 times.  Up to 0.10.1 the flag makes no
    difference, and XLA ends the program at a flag that it does not know: later releases are left alone.
    XLA reads the flag from the environment when JAX starts, so call it before that.  A flag that was set already
    stays.  Nothing is set where a plugin for accelerators is installed: it brings an XLA of its own, which may refuse
    flags that it does not know, and the CPU is then not what programs run on.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    accelerator = any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu"))
    version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:3] if part.isdecimal())
    first, beyond = SLOW_CONVOLUTIONS
    if not first <= version < beyond or accelerator or FLAG in flags:
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=-individual_convolution".strip()
    return True


def without_graphs(platform: str) -> dict[str, str] | None:
    """``compiler_options`` for ``jax.jit`` that have a program's operations launched one by one on GPUs, not as CUDA graphs.

    XLA records most of a program as graphs ("command buffers"), and updates them when buffers have come to lie elsewhere.
    On an H200 (jax 0.11.2) training on CIFAR-10's images, 512 at once, ran at 2,656 to 2,940 img/s with graphs, and at
    3,392 to 3,477 without, the same command a few minutes later, presumably because batches and metrics lie elsewhere in
    every step.  (By XLA's flag; by these options the program that XLA makes for an H200 is the same, to the last operation.)
    For a program that loops on the device, where buffers stay in place, graphs may pay; that was not tried on a GPU.

    Args:
      platform: where the program will run, as JAX calls it.

    Returns:
      None where it would do nothing, or XLA_FLAGS has a choice that was made already.
    """
    if platform != "gpu" or COMMAND_BUFFERS in os.environ.get("XLA_FLAGS", ""):
        return None
    return {COMMAND_BUFFERS.removeprefix("--"): ""}


def launch_operations_singly() -> bool:
    """:func:`without_graphs` for all programs of this process, so that traces name operations; returns whether it will.

    A trace knows a graph's name only, not those of the operations in it (openxla/xprof issues 2544 and 3070).  As with
    the other flag: call it before JAX starts, a choice that was made already stays, and nothing is set where it would do
    nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if COMMAND_BUFFERS in flags or not has_cuda_plugin():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {COMMAND_BUFFERS}=".strip()
    return True


def has_cuda_plugin() -> bool:
    """Whether JAX's plugin for NVIDIA's GPUs is installed; there need be no GPU."""
    return any(plugin.name.startswith("xla_cuda") for plugin in importlib.metadata.entry_points(group="jax_plugins"))
