"""Flags of XLA's: one that a release of jaxlib needs to be as fast as the others, one that a trace of a GPU needs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

# The one release whose convolutions on CPUs are slow, and the last for Python 3.11.
SLOW_CONVOLUTIONS = "0.10.2"
FLAG = "--xla_cpu_experimental_ynn_fusion_type"
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer"


def avoid_slow_convolutions() -> bool:
    """Have jaxlib 0.10.2 compute convolutions on CPUs with Eigen, as other releases do; returns whether it will.

    That release gives them to YNNPACK, which takes 1.8 times as long for the 3x3 convolutions of a U-Net (measured with
    64 channels at 8x8 on a CPU with AVX-512; jax 0.8.2 to 0.10.1 and 0.12.0 are as fast with the flag as without).
    XLA reads the flag from the environment when JAX starts, so call it before that.  A flag that was set already
    stays.  Nothing is set where a plugin for accelerators is installed: it brings an XLA of its own, which may refuse
    flags that it does not know, and the CPU is then not what programs run on.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    accelerator = any(importlib.util.find_spec(plugin) for plugin in ("jax_plugins", "libtpu"))
    if importlib.metadata.version("jaxlib") != SLOW_CONVOLUTIONS or accelerator or FLAG in flags:
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=-individual_convolution".strip()
    return True


def launch_operations_singly() -> bool:
    """Have XLA launch each operation by itself on NVIDIA's GPUs, so that a trace can name it; returns whether it will.

    XLA records most of a program as CUDA graphs ("command buffers") and launches these, and a trace then knows a graph's
    name only, not those of the operations in it (openxla/xprof issues 2544 and 3070).  As with the other flag: call it
    before JAX starts, a choice that was made already stays, and nothing is set where it would do nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    if COMMAND_BUFFERS in flags or not any(plugin.name.startswith("xla_cuda") for plugin in plugins):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {COMMAND_BUFFERS}=".strip()
    return True
