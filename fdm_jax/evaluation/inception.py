"""Inception-v3 as the Frechet Inception Distance is defined with it: the TensorFlow graph of 2015-12-05, inference only.

It differs from the Inception-v3 of the paper and of torchvision in what its pooling branches do (averages leave padding
out, ``Mixed_7c`` takes maxima), in 1008 classes, and in its weights.  PyTorch has them in a file of pytorch-fid's
release "fid_weights", whose names the modules here keep; each batch normalisation is folded into its convolution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fdm_jax.errors import UserError
from fdm_jax.evaluation.weights import check_weights, sha256, weights_of
from fdm_jax.interop.snapshots import import_torch
from fdm_jax.whole_files import write_whole

SIZE = 299
CLASSES = 1008
PTH = "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid's name; its end is where the file's sha256 begins
# A TPU multiplies in bfloat16 by default, and a GPU may in TF32: errors that would move the distance.
HIGHEST = jax.lax.Precision.HIGHEST

_WHAT = "the Inception-v3 of the Frechet Inception Distance"
_EPSILON = 1e-3
_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, its batch normalisation, a ReLU."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, H', W', features]; to be called inside a module, of which it becomes a part."""
        conv = nn.Conv(self.features, self.kernel, self.stride, padding=self.padding, precision=HIGHEST, name=self.name)
        return nn.relu(conv(x))


# Layers one after the other; a tuple among them is a fork, whose outputs are concatenated.
Branch = tuple[Layer | tuple[Layer, ...], ...]


class Mixed(nn.Module):
    """Branches side by side, the last of them a pooling over 3x3 pixels; their outputs are concatenated.

    Attributes:
      branches: all but the last.
      pool: "average" over the pixels inside the image, "max", or "shrink", a maximum with stride 2.
      pool_features: of the 1x1 convolution after the pooling; 0 for none.
    """

    branches: tuple[Branch, ...]
    pool: str
    pool_features: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = []
        for branch in self.branches:
            h = x
            for step in branch:
                h = step(h) if isinstance(step, Layer) else jnp.concatenate([layer(h) for layer in step], axis=-1)
            outputs.append(h)
        pooled = _pool(self.pool, x)
        outputs.append(Layer("branch_pool", self.pool_features)(pooled) if self.pool_features else pooled)
        return jnp.concatenate(outputs, axis=-1)


def _pool(kind: str, x: jax.Array) -> jax.Array:
    if kind == "average":
        return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
    if kind == "max":
        return nn.max_pool(x, (3, 3), padding="SAME")
    return nn.max_pool(x, (3, 3), (2, 2))


def _mixed_35(name: str, pool_features: int) -> Mixed:
    """The blocks on 35x35 pixels."""
    branches: tuple[Branch, ...] = (
        (Layer("branch1x1", 64),),
        (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))),
        (Layer("branch3x3dbl_1", 64), Layer("branch3x3dbl_2", 96, (3, 3)), Layer("branch3x3dbl_3", 96, (3, 3))),
    )
    return Mixed(branches, "average", pool_features, name=name)


def _mixed_17(name: str, features: int) -> Mixed:
    """The blocks on 17x17 pixels; ``features`` inside the branches of 7x7."""
    row, column = (1, 7), (7, 1)
    branches: tuple[Branch, ...] = (
        (Layer("branch1x1", 192),),
        (
            Layer("branch7x7_1", features),
            Layer("branch7x7_2", features, row),
            Layer("branch7x7_3", 192, column),
        ),
        (
            Layer("branch7x7dbl_1", features),
            Layer("branch7x7dbl_2", features, column),
            Layer("branch7x7dbl_3", features, row),
            Layer("branch7x7dbl_4", features, column),
            Layer("branch7x7dbl_5", 192, row),
        ),
    )
    return Mixed(branches, "average", 192, name=name)


def _mixed_8(name: str, pool: str) -> Mixed:
    """The blocks on 8x8 pixels."""

    def fork(prefix: str) -> tuple[Layer, ...]:
        return Layer(f"{prefix}a", 384, (1, 3)), Layer(f"{prefix}b", 384, (3, 1))

    branches: tuple[Branch, ...] = (
        (Layer("branch1x1", 320),),
        (Layer("branch3x3_1", 384), fork("branch3x3_2")),
        (Layer("branch3x3dbl_1", 448), Layer("branch3x3dbl_2", 384, (3, 3)), fork("branch3x3dbl_3")),
    )
    return Mixed(branches, pool, 192, name=name)


def _to_17(name: str) -> Mixed:
    branches: tuple[Branch, ...] = (
        (Layer("branch3x3", 384, (3, 3), 2, "VALID"),),
        (
            Layer("branch3x3dbl_1", 64),
            Layer("branch3x3dbl_2", 96, (3, 3)),
            Layer("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
        ),
    )
    return Mixed(branches, "shrink", name=name)


def _to_8(name: str) -> Mixed:
    branches: tuple[Branch, ...] = (
        (Layer("branch3x3_1", 192), Layer("branch3x3_2", 320, (3, 3), 2, "VALID")),
        (
            Layer("branch7x7x3_1", 192),
            Layer("branch7x7x3_2", 192, (1, 7)),
            Layer("branch7x7x3_3", 192, (7, 1)),
            Layer("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
        ),
    )
    return Mixed(branches, "shrink", name=name)


class Inception(nn.Module):
    """The network behind resizing and normalisation."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [B, 299, 299, 3] -> the average of the last block [B, 2048], logits without bias [B, 1008]."""
        x = Layer("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")(x)
        x = Layer("Conv2d_2a_3x3", 32, (3, 3), padding="VALID")(x)
        x = Layer("Conv2d_2b_3x3", 64, (3, 3))(x)
        x = _pool("shrink", x)
        x = Layer("Conv2d_3b_1x1", 80)(x)
        x = Layer("Conv2d_4a_3x3", 192, (3, 3), padding="VALID")(x)
        x = _pool("shrink", x)
        x = _mixed_35("Mixed_5b", 32)(x)
        x = _mixed_35("Mixed_5c", 64)(x)
        x = _mixed_35("Mixed_5d", 64)(x)
        x = _to_17("Mixed_6a")(x)
        x = _mixed_17("Mixed_6b", 128)(x)
        x = _mixed_17("Mixed_6c", 160)(x)
        x = _mixed_17("Mixed_6d", 160)(x)
        x = _mixed_17("Mixed_6e", 192)(x)
        x = _to_8("Mixed_7a")(x)
        x = _mixed_8("Mixed_7b", "average")(x)
        x = _mixed_8("Mixed_7c", "max")(x)
        features = jnp.mean(x, axis=(1, 2))
        return features, nn.Dense(CLASSES, use_bias=False, precision=HIGHEST, name="fc")(features)


def inception_features(variables: Mapping[str, Any], images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the Frechet Inception Distance and the Inception Score are computed of; can be jitted.

    Args:
      variables: of :func:`load_inception`.
      images: [B, H, W, 3 or 1] in 0..255, uint8 or float; grey is repeated to three channels.

    Returns:
      Features [B, 2048] and logits [B, 1008], float32.  The logits lack the graph's bias, as in the Inception Score's
      own code (Salimans et al. 2016), which takes the softmax over all 1008 of features times matrix.

    Raises:
      UserError: images of another shape or type.
    """
    x = as_rgb(resize_bilinear(check_images(images), SIZE))
    return Inception().apply(variables, (x - 128) / 128)  # type: ignore[return-value]


def check_images(images: jax.Array) -> jax.Array:
    """The images as float32.

    Raises:
      UserError: they are not [B, H, W, 3 or 1], or neither uint8 nor float.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        raise UserError(f"Images must be of shape [B, H, W, 3 or 1], and are of shape {list(images.shape)}.")
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"Images must be uint8 or float in 0..255, and are {images.dtype}.")
    return jnp.asarray(images, jnp.float32)


def as_rgb(images: jax.Array) -> jax.Array:
    """[B, H, W, 3 or 1] -> [B, H, W, 3]."""
    return jnp.broadcast_to(images, (*images.shape[:3], 3))


def resize_bilinear(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] float32 -> [B, size, size, C] as ``tf.image.resize_bilinear`` of TensorFlow 1 does by default.

    Pixel i comes from position i * H / size between its two neighbours: the corner stays where it is, and going down
    nothing is averaged.  Later resizing, PyTorch's too, puts pixels at i + 1/2.
    """
    for axis in (2, 1):
        length = images.shape[axis]
        at = np.arange(size, dtype=np.float32) * (np.float32(length) / np.float32(size))
        low = np.minimum(at.astype(np.int32), length - 1)
        high = np.minimum(low + 1, length - 1)
        fraction = (at - low).reshape((-1, 1, 1) if axis == 1 else (-1, 1))
        low_values, high_values = jnp.take(images, low, axis), jnp.take(images, high, axis)
        images = low_values + (high_values - low_values) * fraction
    return images


def load_inception(path: Path) -> dict[str, Any]:
    """Variables for :func:`inception_features`.

    Args:
      path: ``.safetensors`` of :func:`convert_inception`, or pytorch-fid's ``.pth`` (which needs torch).

    Raises:
      UserError: no such file, torch is missing, or the file is damaged or holds anything but this network.
    """
    return {"params": _fold(_read(path))}


def convert_inception(source: Path, out: Path) -> None:
    """Writes pytorch-fid's ``.pth`` as a ``.safetensors``, which can be read without torch.

    Raises:
      UserError: see :func:`load_inception`; or ``out`` is there already, ends otherwise, or cannot be written.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"The converted file must end in .safetensors, and is {out}.")
    if out.exists():
        raise UserError(f"{out} is there already: delete it, or give another name.")
    # One entry alone: of several the order is chance, and with it the checksum by which results know their weights.
    content = safetensors.numpy.save(_read(source), metadata={"source": f"{source.name}, sha256 {sha256(source)}"})
    write_whole(out, lambda temporary: temporary.write_bytes(content))


def _read(path: Path) -> dict[str, np.ndarray]:
    """The checked tensors of a file, under pytorch-fid's names."""
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise UserError(f"A file of Inception's weights ends in .safetensors or .pth ({PTH}), and {path} does not.")
    with weights_of(path, _WHAT):
        state = safetensors.numpy.load_file(path) if path.suffix == ".safetensors" else _load_torch(path)
        state = {name: value for name, value in state.items() if not name.endswith(".num_batches_tracked")}
        check_weights(state, _shapes())
    return state


def _load_torch(path: Path) -> dict[str, np.ndarray]:
    state = import_torch("read Inception's weights from a .pth file").load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise UserError("it holds no tensors by name")
    return {name: value.numpy() for name, value in state.items()}


@functools.cache
def _kernels() -> dict[tuple[str, ...], tuple[int, ...]]:
    """Kernel shapes [kh, kw, I, O] of the convolutions by their modules' names."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    variables = jax.eval_shape(Inception().init, jax.random.key(0), image)
    flat = flax.traverse_util.flatten_dict(variables["params"])
    return {path[:-1]: leaf.shape for path, leaf in flat.items() if leaf.ndim == 4}


def _shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors under pytorch-fid's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for modules, (height, width, inputs, outputs) in _kernels().items():
        prefix = ".".join(modules)
        shapes[f"{prefix}.conv.weight"] = (outputs, inputs, height, width)
        shapes |= {f"{prefix}.bn.{name}": (outputs,) for name in _NORM}
    return shapes | {"fc.weight": (CLASSES, 2048), "fc.bias": (CLASSES,)}


def _fold(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of :class:`Inception`: normalisations become part of kernels and biases, in float64."""
    params: dict[tuple[str, ...], np.ndarray] = {("fc", "kernel"): np.ascontiguousarray(state["fc.weight"].T)}
    for modules in _kernels():
        prefix = ".".join(modules)
        weight, bias, mean, variance = (np.asarray(state[f"{prefix}.bn.{name}"], np.float64) for name in _NORM)
        scale = weight / np.sqrt(variance + _EPSILON)
        kernel = state[f"{prefix}.conv.weight"].transpose(2, 3, 1, 0) * scale
        params[(*modules, "kernel")] = kernel.astype(np.float32, order="C")
        params[(*modules, "bias")] = (bias - mean * scale).astype(np.float32)
    return flax.traverse_util.unflatten_dict(params)
