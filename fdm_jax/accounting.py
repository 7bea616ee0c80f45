"""What a run costs, without running it: floating-point operations and memory, from shapes alone.

Only convolutions and matrix products are counted: they are all but a few per cent of the operations of a U-Net,
and what the peak rate of an accelerator is quoted for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

# Float32 copies of the parameters that a train step holds at once: the parameters themselves, their average,
# Adam's two moments, and the gradients.
STATE_COPIES = 5

# The backward pass takes every product twice: for the gradient of its input and for that of its weights.
TRAIN_PASSES = 3

REMAT = ("checkpoint", "remat2")  # names that JAX's primitive of jax.checkpoint has had


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """One device as JAX counts them, with its vendor's figures.

    Attributes:
      title: name for people.
      bfloat16_tflops: 10^12 operations per second at the peak, in dense matrix products of bfloat16 values; on a
        device without units for them, the rate of float32, which XLA then computes in.
      float32_tflops: the same for what JAX does by default with float32 values: TF32 on NVIDIA devices that have
        it, one pass of bfloat16 on TPUs.
      memory_gib: 2^30 bytes.
    """

    title: str
    bfloat16_tflops: float
    float32_tflops: float
    memory_gib: float

    def peak_tflops(self, dtype: Any) -> float:
        """Of a compute type, float32 or bfloat16."""
        return self.bfloat16_tflops if jnp.dtype(dtype) == jnp.bfloat16 else self.float32_tflops


ACCELERATORS: dict[str, Accelerator] = {
    # The T4's 65 and the V100's 125 TFLOP/s are of float16, which loses FDM's input at high noise.
    "t4": Accelerator("NVIDIA T4", 8.1, 8.1, 16),
    "v100": Accelerator("NVIDIA V100 32GB", 15.7, 15.7, 32),
    "l4": Accelerator("NVIDIA L4", 121, 60, 24),
    "l40s": Accelerator("NVIDIA L40S", 362, 183, 48),
    "a6000": Accelerator("NVIDIA RTX A6000", 154.8, 77.4, 48),
    "rtx3090": Accelerator("NVIDIA RTX 3090", 71, 35.6, 24),
    "rtx4090": Accelerator("NVIDIA RTX 4090", 165, 82.6, 24),
    "rtx5090": Accelerator("NVIDIA RTX 5090", 209.5, 104.8, 32),
    "a100": Accelerator("NVIDIA A100 80GB", 312, 156, 80),
    "a100-40": Accelerator("NVIDIA A100 40GB", 312, 156, 40),
    "h100": Accelerator("NVIDIA H100 SXM", 989, 494, 80),
    "h200": Accelerator("NVIDIA H200", 989, 494, 141),
    "b200": Accelerator("NVIDIA B200", 2250, 1100, 180),
    "tpu-v3": Accelerator("TPU v3 core", 61.5, 61.5, 16),  # two to a chip, and JAX counts cores
    "tpu-v4": Accelerator("TPU v4", 275, 275, 32),
    "tpu-v5e": Accelerator("TPU v5e", 197, 197, 16),
    "tpu-v5p": Accelerator("TPU v5p", 459, 459, 95),
    "tpu-v6e": Accelerator("TPU v6e", 918, 918, 32),
    "tpu7x": Accelerator("TPU7x core", 1153.5, 1153.5, 96),  # likewise; 2,307 TFLOP/s and 192 GiB to a chip
}


def count_flops(fn: Callable[..., Any], *args: Any) -> int:
    """2 x multiply-adds of all convolutions and matrix products in ``fn(*args)``, which is traced and not run.

    Zeros of a convolution's padding count like pixels.  A scan counts once per iteration, a conditional as its
    dearest branch.

    Args:
      args: arrays, or ``jax.ShapeDtypeStruct``s in their place.

    Raises:
      ValueError: there is a product in a ``while`` loop, whose number of iterations nobody knows beforehand.
    """
    return _jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_flops(jaxpr: Jaxpr) -> int:
    return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = _shape(equation.invars[0])
        return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(_shape(equation.outvars[0])) * per_output
    if name == "cond":
        return max(_jaxpr_flops(branch.jaxpr) for branch in params["branches"])
    inner = sum(map(_jaxpr_flops, _inner(equation)))
    if name == "while" and inner:
        raise ValueError("The operations in a while loop cannot be counted without running it.")
    return inner * params["length"] if name == "scan" else inner


def _inner(equation: JaxprEqn) -> list[Jaxpr]:
    """Bodies of a call of any kind (jit, scan, custom derivatives, checkpoints), which holds them among its parameters."""
    leaves = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr | Jaxpr))
    return [
        leaf.jaxpr if isinstance(leaf, ClosedJaxpr) else leaf
        for leaf in leaves
        if isinstance(leaf, ClosedJaxpr | Jaxpr)
    ]


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _plain(network: Any) -> Any:
    """The network with attention as products that can be counted, and traced on any platform."""
    return network.clone(attention="auto") if getattr(network, "attention", "auto") != "auto" else network


def _inputs(network: nn.Module, image_shape: tuple[int, ...], batch: int) -> tuple[Any, ...]:
    """Shapes of variables, x, c_noise, class labels and augmentation labels of a batch."""

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(_plain(network).init, key, shape(1, *image_shape), shape(1))
    labels = [shape(batch, width) if width else None for width in (network.label_dim, network.augment_dim)]
    return variables, shape(batch, *image_shape), shape(batch), *labels


def parameter_count(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Trained numbers of a :class:`~fdm_jax.networks.SongUNet` for images (H, W, C)."""
    variables, *_ = _inputs(network, image_shape, 1)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def forward_flops(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Operations of one pass over one image."""
    return count_flops(_plain(network).apply, *_inputs(network, image_shape, 1))


def train_flops(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Operations per training image, see :data:`TRAIN_PASSES`; what is computed twice to save memory counts once."""
    return TRAIN_PASSES * forward_flops(network, image_shape)


def recomputed_flops(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """Operations per training image that the blocks of ``network.remat`` add to :func:`train_flops`."""
    jaxpr = jax.make_jaxpr(_plain(network).apply)(*_inputs(network, image_shape, 1)).jaxpr
    return sum(_equation_flops(equation) for equation in jaxpr.eqns if equation.primitive.name in REMAT)


def state_bytes(parameters: int, accumulation: int = 1) -> int:
    """Memory that a train step needs whatever its batch: on every device, or on all together where the state is dealt out.

    See :data:`STATE_COPIES`; several accumulation rounds add the running sum of the gradients.
    """
    return 4 * parameters * (STATE_COPIES + (accumulation > 1))


def activation_bytes(network: nn.Module, image_shape: tuple[int, ...], batch: int) -> int:
    """What the convolutions and matrix products of a forward pass over ``batch`` images read and write.

    That is what XLA's programs for accelerators keep for the backward pass, more or less: the rest is computed again.
    Compiled for the description of an H200, CIFAR-10's train step of 512 images set aside 0.8 of this (0.9 to 1.0 with
    rematerialised blocks), and for a TPU v4 or v5e, of 32 images, 0.6 to 0.7.  Parameters are not in it (see
    :func:`state_bytes`), but their casts to the compute type are.  Of the blocks of ``network.remat`` the inputs are in
    it, and the inside of one of them, of mean size: that which is being computed again.
    """
    kept = _kept_bytes(network, image_shape, batch)
    remat = getattr(network, "remat", ())
    if not remat:
        return kept
    one_inside = 0
    for res in remat:
        rest = network.clone(remat=tuple(other for other in remat if other != res))
        one_inside = max(one_inside, (_kept_bytes(rest, image_shape, batch) - kept) // _blocks_at(network, res))
    return kept + one_inside


def _blocks_at(network: Any, res: int) -> int:
    """Residual blocks at a resolution: the encoder's, one more of the decoder, and those that change resolution."""
    finest, coarsest = res == network.resolution, res == network.resolution >> len(network.channel_mult) - 1
    return 2 * network.num_blocks + 1 + (not finest) + (2 if coarsest else 1)


def _kept_bytes(network: nn.Module, image_shape: tuple[int, ...], batch: int) -> int:
    variables, *inputs = _inputs(network, image_shape, batch)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))

    def forward(variables: Any, inputs: Any, keys: jax.Array) -> Any:
        return _plain(network).apply(variables, *inputs, dropout_keys=keys)

    jaxpr = jax.make_jaxpr(forward)(variables, inputs, keys).jaxpr
    return _bytes_read_and_written(jaxpr, given=set(jaxpr.invars))


def _bytes_read_and_written(jaxpr: Jaxpr, given: set[Any]) -> int:
    """Of arrays that products read or write and rematerialised blocks read, each counted once, but for those given."""
    touched: set[Any] = set()
    inside = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            touched |= {*equation.invars, *equation.outvars}
        elif equation.primitive.name in REMAT:
            touched |= {variable for variable in equation.invars if not isinstance(variable, Literal)}
        else:
            inside += sum(_bytes_read_and_written(inner, set()) for inner in _inner(equation))
    return inside + sum(v.aval.size * v.aval.dtype.itemsize for v in touched - given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A training run in numbers.

    Attributes:
      title: what is trained, for people.
      dtype: compute type of the network.
      parameters: of the network.
      forward_flops: operations of one pass over one image.
      recomputed_flops: operations that a training image takes beside the three passes, see there.
      activation_bytes_fixed, activation_bytes_per_image: :func:`activation_bytes`, which is affine in the batch.
      images, batch_size, accumulation: of the run, over all devices.
      nfe: passes per sample.
      accelerator, num_devices: what it runs on.
      utilisation: share of the accelerator's peak that the run is assumed to reach.
      price: US dollars per device and hour, if known.
      dealt: whether each device holds its part of the state only (``parallel=fsdp``).
    """

    title: str
    dtype: str
    parameters: int
    forward_flops: int
    activation_bytes_fixed: int
    activation_bytes_per_image: int
    images: int
    batch_size: int
    accumulation: int
    nfe: int
    accelerator: Accelerator
    num_devices: int
    utilisation: float
    recomputed_flops: int = 0
    price: float | None = None
    dealt: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return math.ceil(self.images / self.batch_size)

    @property
    def step_flops(self) -> int:
        """Of one optimiser step on all devices."""
        return self.batch_size * (TRAIN_PASSES * self.forward_flops + self.recomputed_flops)

    @property
    def training_flops(self) -> int:
        """Of the whole run."""
        return self.steps * self.step_flops

    @property
    def images_at_once(self) -> int:
        """A device's share of one accumulation round."""
        return math.ceil(self.batch_size / (self.num_devices * self.accumulation))

    @property
    def state_bytes(self) -> int:
        """Per device; dealt out but for small arrays, which are left out of account."""
        if not self.dealt:
            return state_bytes(self.parameters, self.accumulation)
        return math.ceil(state_bytes(self.parameters, self.accumulation) / self.num_devices) + self.gathered_bytes

    @property
    def gathered_bytes(self) -> int:
        """Of whole parameters, where the state is dealt out; those in bfloat16 are among the casts of the activations."""
        return 4 * self.parameters if self.dealt and self.dtype == "float32" else 0

    @property
    def activation_bytes(self) -> int:
        """Per device."""
        return self.activation_bytes_fixed + self.images_at_once * self.activation_bytes_per_image

    @property
    def memory_share(self) -> float:
        """Of a device's memory that a step takes; above 1 it does not fit."""
        return (self.state_bytes + self.activation_bytes) / (self.accelerator.memory_gib * 2**30)

    def seconds(self, flops: int) -> float:
        """Time that all devices together take for so many operations, at the assumed utilisation."""
        peak = self.accelerator.peak_tflops(self.dtype) * 1e12
        return flops / (peak * self.utilisation * self.num_devices)

    @property
    def images_per_second(self) -> float:
        """In training, on all devices together."""
        return self.batch_size / self.seconds(self.step_flops)

    def dollars(self, flops: int) -> float:
        """Price of that time on all devices; needs ``price``."""
        assert self.price is not None
        return self.seconds(flops) / 3600 * self.num_devices * self.price

    def fitting_accumulation(self) -> int | None:
        """The fewest rounds per step with which the run fits the memory; None if none does."""
        share = self.batch_size // self.num_devices
        rounds = (r for r in range(1, share + 1) if share % r == 0)
        return next((r for r in rounds if dataclasses.replace(self, accumulation=r).memory_share <= 1), None)
