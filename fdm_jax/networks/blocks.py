"""Convolution with resampling, attention, and the residual block of the U-Nets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.networks.resample import downsample, upsample

Dtype = Any
SQRT_HALF = math.sqrt(0.5)
EPSILON = 1e-6  # of GroupNorm


def xavier_uniform(scale: float = 1.0) -> nn.initializers.Initializer:
    """Xavier-uniform over the receptive field, times ``scale``: 1e-5 starts a branch near zero."""
    xavier = nn.initializers.xavier_uniform()
    return lambda *args, **kwargs: scale * xavier(*args, **kwargs)


def num_groups(channels: int) -> int:
    """Groups of a GroupNorm over ``channels``: at least four channels each, at most 32 groups."""
    return max(min(32, channels // 4), 1)


def group_norm(channels: int, dtype: Dtype, name: str | None) -> GroupNorm:
    """The networks' GroupNorm over ``channels``."""
    return GroupNorm(num_groups(channels), dtype, name=name)


class GroupNorm(nn.Module):
    """GroupNorm over [B, H, W, C] with eps 1e-6; statistics in float32.

    Sums over pixels before it sums over the channels of a group: the other way round, as Flax has it, XLA's programs for
    CPUs cannot fill a vector, and norm and silu take twice the time.

    The variance of float32 values is the mean of (x - mean)^2, which small inputs need.  That of bfloat16 values is, of
    each channel, mean(x^2) - mean^2: its error, 2^-24 of mean^2, is far below what their rounding has put into x already
    (2^-9 of it), and both sums are then taken in one pass, which XLA on TPUs joins to the convolution that makes x.  Of an x
    that was put together of parts they are taken part by part: the encoder has taken its parts' already.

    With a shift, which is one number for all pixels of a channel, x + shift is normalised and never computed: only the
    channel's mean changes.  (Added to x, XLA on GPUs would spread it over all pixels in memory first.)

    Attributes:
      num_groups: of consecutive channels.
      dtype: of the result.
    """

    num_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, shift: jax.Array | None = None, parts: Sequence[jax.Array] | None = None
    ) -> jax.Array:
        """x [B, H, W, C], the parts [B, H, W, c] that make it up, shift [B, C] float32 -> [B, H, W, C]."""
        B, H, W, C = x.shape
        scale = self.param("scale", nn.initializers.ones, (C,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (C,), jnp.float32)

        def of_group(values: jax.Array) -> jax.Array:
            """Mean over each channel's group: [B, C] -> [B, C]."""
            groups = values.reshape(B, self.num_groups, C // self.num_groups).mean(axis=-1)
            return jnp.repeat(groups, C // self.num_groups, axis=-1)

        if one_pass := x.dtype == jnp.bfloat16:
            own, squares = _moments(x, [x] if parts is None else parts)
        x = x.astype(jnp.float32)
        if not one_pass:
            own = jnp.mean(x, axis=(1, 2))
        centre = of_group(own) if shift is None else of_group(own + shift) - shift  # of the group, in the channel's x
        if one_pass:
            variance = of_group(jnp.maximum(squares - jnp.square(own), 0) + jnp.square(own - centre))
        else:
            variance = of_group(jnp.mean(jnp.square(x - centre[:, None, None, :]), axis=(1, 2)))
        factor = jax.lax.rsqrt(variance + EPSILON) * scale[None]
        return ((x - centre[:, None, None, :]) * factor[:, None, None, :] + bias[None, None, None]).astype(self.dtype)


@jax.custom_jvp
def _moments(x: jax.Array, parts: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Means over pixels of x and x^2, float32 [B, C], taken of the parts [B, H, W, c] that make up x [B, H, W, C].

    Derivatives are those by x: by the parts they would have to be kept beside it for the backward pass.
    """
    wide = [part.astype(jnp.float32) for part in parts]
    mean, squares = ([jnp.mean(power(part), axis=(1, 2)) for part in wide] for power in (jnp.positive, jnp.square))
    return jnp.concatenate(mean, axis=-1), jnp.concatenate(squares, axis=-1)


@_moments.defjvp
def _moments_jvp(primals: Any, tangents: Any) -> Any:
    x, dx = (a.astype(jnp.float32) for a in (primals[0], tangents[0]))
    return _moments(*primals), (jnp.mean(dx, axis=(1, 2)), jnp.mean(2 * x * dx, axis=(1, 2)))


class Conv(nn.Module):
    """Same-size convolution [B, H, W, C] -> [B, H', W', features], doubling or halving the image on the way.

    Attributes:
      features: output channels.
      kernel_size: 1 or 3.
      resample: None, "up" or "down"; comes before the convolution.
      resample_filter: taps of the resampling filter.
      fused: resample after the convolution when going down (before it when going up) with the paddings of both
        pushed to the first operation, so that no border of zeros arises between the two.
      init_scale: factor on the Xavier-uniform start of the kernel.
      give_bias: (the result without its bias, the bias [features] float32) instead of their sum.
    """

    features: int
    kernel_size: int = 3
    resample: str | None = None
    resample_filter: Sequence[float] = (1, 1)
    fused: bool = False
    init_scale: float = 1.0
    give_bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        k, taps = self.kernel_size, self.resample_filter
        kernel = self.param("kernel", xavier_uniform(self.init_scale), (k, k, x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        w_pad, f_pad = k // 2, (len(taps) - 1) // 2

        def conv(x: jax.Array, pad: int) -> jax.Array:
            return _convolved(x, kernel, pad)

        if self.resample is None:
            x = conv(x, w_pad)
        elif self.fused and self.resample == "up":
            x = conv(upsample(x, taps, max(f_pad - w_pad, 0)), max(w_pad - f_pad, 0))
        elif self.fused:
            x = downsample(conv(x, w_pad + f_pad), taps, 0)
        elif self.resample == "down":
            x = conv(downsample(x, taps), w_pad)
        elif k == 1:
            x = upsample(conv(x, 0), taps)  # a 1x1 kernel commutes with the filter: a quarter of the work
        else:
            x = conv(upsample(x, taps), w_pad)
        return (x, bias) if self.give_bias else _add_bias(x, bias)


def _convolved(x: jax.Array, kernel: jax.Array, pad: int) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _beside(bias: jax.Array, x: jax.Array) -> jax.Array:
    """With axes of length 1 for those that x [..., C] has more."""
    return bias.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_jvp
def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., C] + bias [C] in the type of x; the bias's gradient, a sum over all pixels, is taken in float32.

    By itself it would be summed in the type of x, which is less exact, and on TPUs slower.
    """
    return x + _beside(bias, x).astype(x.dtype)


@_add_bias.defjvp
def _add_bias_jvp(primals: Any, tangents: Any) -> Any:
    dx, dbias = tangents
    exact = dx.astype(dbias.dtype) + _beside(dbias, dx)  # float32: so is the sum that the transposition makes
    return _add_bias(*primals), exact.astype(dx.dtype)


class QKV(nn.Module):
    """q, k and v of every pixel, each [B, H * W, 1, C]: a 1x1 convolution of x [B, H, W, C] to 3 C channels.

    On TPUs these are three convolutions, whose results XLA writes as attention reads them; parts of one it would copy.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> Sequence[jax.Array]:
        B, H, W, C = x.shape
        kernel = self.param("kernel", xavier_uniform(math.sqrt(0.2)), (1, 1, C, 3 * C), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (3 * C,), jnp.float32)

        def of_one(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Sequence[jax.Array]:
            return jnp.split(convolved(x, kernel, bias), 3, axis=-1)

        def of_three(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> Sequence[jax.Array]:
            return [
                convolved(x, k, b) for k, b in zip(*(jnp.split(a, 3, axis=-1) for a in (kernel, bias)), strict=True)
            ]

        def convolved(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
            return _add_bias(_convolved(x, kernel, 0), bias).reshape(B, H * W, 1, -1)

        return jax.lax.platform_dependent(
            x.astype(self.dtype), kernel.astype(self.dtype), bias, tpu=of_three, default=of_one
        )


class Attention(nn.Module):
    """Self-attention over all pixels, one head; softmax in float32.  Residual: (x + proj(attend(x))) / sqrt(2).

    Attributes:
      implementation: see :func:`attend`.
    """

    dtype: Dtype = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, H, W, C = x.shape
        h = group_norm(C, self.dtype, "norm2")(x)
        q, k, v = QKV(self.dtype, name="qkv")(h)
        h = attend(q, k, v, self.implementation).reshape(B, H, W, C)
        return (Conv(C, 1, init_scale=1e-5, dtype=self.dtype, name="proj")(h) + x) * jnp.asarray(SQRT_HALF, x.dtype)


# How attention is computed.  "auto" is what is known to be best; up to now that is XLA's everywhere.
ATTENTION = ("auto", "xla", "cudnn")
CUDNN_MAX_CHANNELS = 256


def attend(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str = "auto") -> jax.Array:
    """softmax(q k^T / sqrt(C)) v for q, k, v [B, positions, heads, C].

    Args:
      implementation: one of :data:`ATTENTION`.  "cudnn" is NVIDIA's fused kernel, which keeps no [positions,
        positions] matrix: for bfloat16 and at most 256 channels.

    Raises:
      UserError: "cudnn" where it cannot run.
    """
    if implementation == "cudnn":
        check_cudnn(q.dtype, q.shape[-1])
        if (backend := jax.default_backend()) != "gpu":
            raise UserError(f"network.attention is 'cudnn', which runs on NVIDIA GPUs only, and this is a {backend}.")
    chosen: Any = None if implementation == "auto" else implementation
    return jax.nn.dot_product_attention(q, k, v, implementation=chosen)


def check_cudnn(dtype: Dtype, channels: int) -> None:
    """Raise a UserError unless cuDNN's attention takes such values."""
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise UserError(
            f"network.attention is 'cudnn', which needs network.dtype = 'bfloat16', and that is {jnp.dtype(dtype).name!r}."
        )
    if channels > CUDNN_MAX_CHANNELS:
        raise UserError(
            f"network.attention is 'cudnn', which takes at most {CUDNN_MAX_CHANNELS} channels, and there are {channels}."
        )


def dropout(x: jax.Array, rate: float, keys: jax.Array) -> jax.Array:
    """Zero each value of x [B, ...] with probability ``rate`` and scale the rest up; one key per example, [B].

    A key per example (rather than one per batch) makes an example's mask independent of how the batch is cut
    over devices and accumulation rounds.  The mask is :func:`hashed_bits` below a threshold: jax.random's own bits take
    six times the operations, which is 6 % of a train step on CPUs, and more than that on accelerators.
    """
    # By name, as the types of the other draws: with x64 on, the default is 64 bits, almost never below the threshold.
    words = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    threshold = np.uint32(min(round(rate * 2**32), 2**32 - 1))
    drop = jax.vmap(lambda words: hashed_bits(words, x.shape[1:]))(words) < threshold
    # Scaled in float32: 1 - rate itself, rounded to bfloat16, would be off by up to 0.2 %, in every block alike.
    return jnp.where(drop, jnp.zeros((), x.dtype), (x.astype(jnp.float32) / (1 - rate)).astype(x.dtype))


def hashed_bits(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform 32-bit numbers of a shape, below 2^32 of them, from two random words: uint32 [2] -> uint32.

    Each is mix(mix(place ^ words[0]) ^ words[1]), with place counted in row-major order, and mix the finaliser of
    MurmurHash3 (A. Appleby, 2011), a permutation of 32-bit numbers whose every bit depends on all.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mix(_mix(place ^ words[0]) ^ words[1])


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


class UNetBlock(nn.Module):
    """Residual block: norm, silu, (resample), conv, + embedding, norm, silu, dropout, conv, + skip; then attention.

    Attributes:
      features: output channels.
      resample, resample_filter: see :class:`Conv`.
      attention: append self-attention.
      dropout: rate; used when the call is given keys.
      attention_implementation: see :func:`attend`.
    """

    features: int
    resample: str | None = None
    resample_filter: Sequence[float] = (1, 1)
    attention: bool = False
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(self, parts: Sequence[jax.Array], emb: jax.Array, dropout_keys: jax.Array | None = None) -> jax.Array:
        """Parts [B, H, W, c], which make up C channels, emb [B, E] float32, keys [B] or None -> [B, H', W', features]."""
        x = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        resampled = {"resample": self.resample, "resample_filter": self.resample_filter, "dtype": self.dtype}
        h = nn.silu(group_norm(x.shape[-1], self.dtype, "norm0")(x, parts=parts))
        # A bias in the shift costs nothing, nor does its gradient, which is else a sum over all pixels.
        h, bias = Conv(self.features, 3, give_bias=True, **resampled, name="conv0")(h)
        shift = nn.Dense(self.features, kernel_init=xavier_uniform(), name="affine")(emb) + bias[None]
        h = nn.silu(group_norm(self.features, self.dtype, "norm1")(h, shift))
        if self.dropout > 0 and dropout_keys is not None:
            h = dropout(h, self.dropout, dropout_keys)
        h = Conv(self.features, 3, init_scale=1e-5, dtype=self.dtype, name="conv1")(h)
        if self.resample is not None or x.shape[-1] != self.features:
            x = Conv(self.features, 1, **resampled, name="skip")(x)
        x = (h + x) * jnp.asarray(SQRT_HALF, h.dtype)
        if self.attention:
            x = Attention(self.dtype, self.attention_implementation, name="attention")(x)
        return x
