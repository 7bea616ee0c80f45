"""DINOv2's vision transformers (Oquab et al. 2024) without registers, inference only: small, base, large, giant.

Weights come from Hugging Face's files (``facebook/dinov2-large`` and its like), whose names the modules here keep, dots
included.  Images are prepared as in dgm-eval (Stein et al. 2023), with which FD-DINOv2 began: resized as Pillow does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fdm_jax.errors import UserError
from fdm_jax.evaluation.inception import HIGHEST, as_rgb, check_images
from fdm_jax.evaluation.weights import check_weights, weights_of

SIZE = 224

_WHAT = "a DINOv2 without registers in Hugging Face's names"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_HEAD = 64
_BITS = 22  # behind the point of the weights in Pillow
_POSITIONS = "embeddings.position_embeddings"
_PROJECTION = "embeddings.patch_embeddings.projection"


@dataclasses.dataclass(frozen=True)
class DinoV2Config:
    """What the shapes in a file say, and one choice.

    Attributes:
      width: of a token; the heads are 64 wide.
      depth: number of layers.
      hidden: width inside a layer's MLP.
      patch: pixels on a patch's side.
      grid: patches on the side of the images of training, for which there are position embeddings.
      gated: the MLP is a SwiGLU, as in the giant.
      offset: what the grid of patches counts as more when position embeddings are interpolated.  The original code,
        and so published FD-DINOv2, has 0.1 (16.1 / 37 instead of 16 / 37); Hugging Face's has 0.
    """

    width: int
    depth: int
    hidden: int
    patch: int
    grid: int
    gated: bool
    offset: float = 0.1


def _dense(features: int, name: str) -> nn.Dense:
    return nn.Dense(features, precision=HIGHEST, name=name)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


class Block(nn.Module):
    """A layer of the transformer: attention, then an MLP, each scaled by channel and added to its input."""

    config: DinoV2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, tokens, width] -> the same."""
        width = self.config.width
        h = _norm("norm1")(x)
        heads = (*x.shape[:2], width // _HEAD, _HEAD)
        q, k, v = (_dense(width, f"attention.attention.{name}")(h).reshape(heads) for name in ("query", "key", "value"))
        h = nn.dot_product_attention(q, k, v, precision=HIGHEST).reshape(x.shape)
        h = _dense(width, "attention.output.dense")(h)
        x = x + h * self.param("layer_scale1.lambda1", nn.initializers.ones, (width,))
        h = self._mlp(_norm("norm2")(x))
        return x + h * self.param("layer_scale2.lambda1", nn.initializers.ones, (width,))

    def _mlp(self, x: jax.Array) -> jax.Array:
        width, hidden = self.config.width, self.config.hidden
        if self.config.gated:
            gate, value = jnp.split(_dense(2 * hidden, "mlp.weights_in")(x), 2, axis=-1)
            return _dense(width, "mlp.weights_out")(nn.silu(gate) * value)
        return _dense(width, "mlp.fc2")(nn.gelu(_dense(hidden, "mlp.fc1")(x), approximate=False))


class DinoV2(nn.Module):
    """The network behind resizing and normalisation."""

    config: DinoV2Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, 224, 224, 3] -> class token behind the last normalisation [B, width]."""
        config = self.config
        patches = (config.patch, config.patch)
        x = nn.Conv(config.width, patches, patches, padding="VALID", precision=HIGHEST, name=_PROJECTION)(x)
        class_token = self.param("embeddings.cls_token", nn.initializers.zeros, (1, 1, config.width))
        positions = self.param(_POSITIONS, nn.initializers.zeros, (1, config.grid**2 + 1, config.width))
        tokens = x.reshape(x.shape[0], -1, config.width) + self._interpolated(positions[0, 1:])
        first = jnp.broadcast_to(class_token + positions[:, :1], (x.shape[0], 1, config.width))
        x = jnp.concatenate([first, tokens], axis=1)
        for index in range(config.depth):
            x = Block(config, name=f"encoder.layer.{index}")(x)
        return _norm("layernorm")(x[:, 0])

    def _interpolated(self, positions: jax.Array) -> jax.Array:
        """[grid^2, width] -> [patches of the image, width]."""
        config, size = self.config, SIZE // self.config.patch
        if size == config.grid:
            return positions
        matrix = interpolation(config.grid, size, config.offset)
        square = positions.reshape(config.grid, config.grid, config.width)
        return jnp.einsum("ih,jw,hwc->ijc", matrix, matrix, square, precision=HIGHEST).reshape(-1, config.width)


def dinov2_features(config: DinoV2Config, variables: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """Features of images; can be jitted with ``config`` static.

    Args:
      config, variables: of :func:`load_dinov2`.
      images: [B, H, W, 3 or 1] in 0..255, uint8 or float; floats are rounded, grey is repeated to three channels.  They
        are resized to 224x224 by :func:`resize_bicubic` and normalised with the mean and deviation of ImageNet.

    Returns:
      [B, width] float32: the class token behind the last normalisation.

    Raises:
      UserError: images of another shape or type.
    """
    pixels = jnp.clip(jnp.round(check_images(images)), 0, 255)
    x = as_rgb(resize_bicubic(pixels, SIZE)) / 255
    return DinoV2(config).apply(variables, (x - jnp.array(_MEAN)) / jnp.array(_STD))  # type: ignore[return-value]


def resize_bicubic(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] float32 of integers in 0..255 -> [B, size, size, C], to the bit as Pillow resizes 8-bit images.

    The kernel gets wider going down.  The width comes first, then the height (Pillow 13 begins with the height of some
    images that are higher than wide), and either result is rounded to 0..255.  Sums are of integers, since ties are
    common where the ratio of the sizes is simple.
    """
    images = images.astype(jnp.int32)
    for axis, sum_over in ((2, "ow,bhwc->bhoc"), (1, "oh,bhwc->bowc")):
        if images.shape[axis] != size:
            sums = jnp.einsum(sum_over, _pillow(images.shape[axis], size), images)
            images = jnp.clip((sums + (1 << (_BITS - 1))) >> _BITS, 0, 255)
    return images.astype(jnp.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel of parameter a."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _pillow(length: int, size: int) -> np.ndarray:
    """Pillow's bicubic resizing of ``length`` pixels to ``size`` as a matrix [size, length] of integers: times 2^22."""
    scale = length / size
    centre = (np.arange(size) + 0.5) * scale
    weights = _cubic((np.arange(length) + 0.5 - centre[:, None]) / max(scale, 1), -0.5)
    weights *= 2**_BITS / weights.sum(axis=1, keepdims=True)
    return np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)


def interpolation(length: int, size: int, offset: float) -> np.ndarray:
    """Bicubic interpolation of PyTorch, ``length`` values to ``size``, as a matrix [size, length], float32.

    Nothing is averaged going down, the kernel's parameter is -3/4, and values at the ends are repeated.  With an offset,
    the step between new values is length / (size + offset).
    """
    centre = (np.arange(size) + 0.5) * length / (size + offset) - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)
    weights = _cubic(taps - centre[:, None], -0.75)
    matrix = np.zeros((size, length))
    np.add.at(matrix, (np.arange(size)[:, None], np.clip(taps, 0, length - 1)), weights)
    return matrix.astype(np.float32)


def load_dinov2(path: Path) -> tuple[DinoV2Config, dict[str, Any]]:
    """Network and variables for :func:`dinov2_features`.

    Args:
      path: ``model.safetensors`` of a ``facebook/dinov2-*`` on Hugging Face.

    Raises:
      UserError: no such file, or it is damaged or holds anything but such a network, such as one with registers.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"A file of DINOv2's weights ends in .safetensors, and {path} does not.")
    with weights_of(path, _WHAT):
        state = safetensors.numpy.load_file(path)
        state.pop("embeddings.mask_token", None)  # for training
        config = _config(state)
        parameters = _parameters(config)
        check_weights(state, {_name(place): _permuted(shape, _TO_TORCH) for place, shape in parameters.items()})
    params = {
        place: np.ascontiguousarray(state[_name(place)].transpose(_permuted(range(len(shape)), _FROM_TORCH)))
        for place, shape in parameters.items()
    }
    return config, {"params": flax.traverse_util.unflatten_dict(params)}


# Of kernels, by their number of dimensions; nothing else has two or four.
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}  # IO -> OI, HWIO -> OIHW
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}


def _permuted(values: Sequence[int], order: Mapping[int, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(values[axis] for axis in order.get(len(values), range(len(values))))


def _name(place: tuple[str, ...]) -> str:
    """Hugging Face's name of one of our parameters."""
    *modules, leaf = place
    return ".".join([*modules, "weight" if leaf in ("kernel", "scale") else leaf])


def _parameters(config: DinoV2Config) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of the network's parameters by their places."""
    image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    params = jax.eval_shape(DinoV2(config).init, jax.random.key(0), image)["params"]
    return {place: leaf.shape for place, leaf in flax.traverse_util.flatten_dict(params).items()}


def _config(state: Mapping[str, np.ndarray]) -> DinoV2Config:
    """What the shapes say.

    Raises:
      UserError: no such network has them; for :func:`weights_of`.
    """
    if "embeddings.register_tokens" in state:
        raise UserError("it has registers; facebook/dinov2-large, for one, has none")
    width, _, patch, _ = _shape(state, f"{_PROJECTION}.weight", 4)
    grid = math.isqrt(max(_shape(state, _POSITIONS, 3)[1] - 1, 0))
    gated = "encoder.layer.0.mlp.weights_in.weight" in state
    hidden, _ = _shape(state, f"encoder.layer.0.mlp.{'weights_in' if gated else 'fc1'}.weight", 2)
    if width < 1 or width % _HEAD:
        raise UserError(f"its tokens are {width} wide, which is no multiple of {_HEAD}")
    if grid < 1 or not 1 <= patch <= SIZE or SIZE % patch:
        raise UserError(f"its patches of {patch} pixels do not fill an image of {SIZE}, or it has no positions")
    depth = len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})
    return DinoV2Config(width, depth, hidden // 2 if gated else hidden, patch, grid, gated)


def _shape(state: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    if name not in state:
        raise UserError(f"the tensor {name} is missing")
    if state[name].ndim != ndim:
        raise UserError(f"the tensor {name} has shape {list(state[name].shape)}, where {ndim} dimensions are right")
    return state[name].shape
