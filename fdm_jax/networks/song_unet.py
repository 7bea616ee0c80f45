"""DDPM++ and NCSN++ (Song et al. 2021, as retrained by Karras et al. 2022) as one Flax module.

Images are NHWC.  Parameters are float32; ``dtype`` is what the convolutions compute in.  Modules are named as
in the original's state dict with the first dot an underscore (``enc_16x16_block0``), resolutions included, so a
checkpoint reads like the figure of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.errors import UserError, nearest
from fdm_jax.networks.blocks import (
    ATTENTION,
    SQRT_HALF,
    Conv,
    Dtype,
    UNetBlock,
    check_cudnn,
    group_norm,
    num_groups,
    xavier_uniform,
)
from fdm_jax.networks.embeddings import FourierEmbedding, positional_embedding

# What sets the two networks apart.
PRESETS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"embedding": "positional", "channel_mult_noise": 1, "residual": False, "resample_filter": (1, 1)},
    "ncsnpp": {"embedding": "fourier", "channel_mult_noise": 2, "residual": True, "resample_filter": (1, 3, 3, 1)},
}
_MAX_CHANNELS = 2**20  # JAX and XLA count the numbers in a layer's weights in 64 bits, and fail where those overflow


class SongUNet(nn.Module):
    """F(x, c_noise, class_labels, augment_labels).

    Attributes:
      resolution: height and width of the images, divisible by 2^(levels - 1).
      channels: of the images, in and out.
      label_dim: number of classes; 0 for an unconditional network.
      augment_dim: width of the augmentation labels; 0 for none.
      preset: "ddpmpp" or "ncsnpp", see :data:`PRESETS`.
      model_channels: channels at the finest level, before its multiplier.
      channel_mult: multiplier of each level, finest first.
      channel_mult_emb: width of the embedding, times model_channels.
      num_blocks: residual blocks per level (the decoder has one more).
      attn_resolutions: resolutions with self-attention, which the coarsest has once even if it is not named.
      dropout: rate in the residual blocks.
      label_dropout: chance that a training example is shown no class, for classifier-free guidance.
      dtype: compute type, float32 or bfloat16.  float16 loses the network's input at high noise.
      attention: how it is computed, see :func:`~fdm_jax.networks.blocks.attend`.
      remat: resolutions whose residual blocks keep only their inputs for the backward pass, which computes the rest
        again: less memory for another forward pass of theirs.  Parameters and numbers are the same.

    Raises:
      UserError: when built with values that do not fit together.
    """

    resolution: int
    channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    preset: str = "ddpmpp"
    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.1
    label_dropout: float = 0.0
    dtype: Dtype = jnp.float32
    attention: str = "auto"
    remat: Sequence[int] = ()

    def __post_init__(self) -> None:
        self._check()
        super().__post_init__()

    @property
    def resolutions(self) -> list[int]:
        """Of the levels, finest first."""
        return [self.resolution >> level for level in range(len(self.channel_mult))]

    def _check(self) -> None:
        if self.preset not in PRESETS:
            raise UserError(f"There is no network preset {self.preset!r}: {nearest(self.preset, PRESETS)}")
        for name in ("resolution", "channels", "model_channels", "num_blocks", "channel_mult_emb"):
            if getattr(self, name) < 1:
                raise UserError(f"network.{name} must be 1 or more, and is {getattr(self, name)}.")
        for name in ("label_dim", "augment_dim"):
            if getattr(self, name) < 0:
                raise UserError(f"network.{name} must be 0 or more, and is {getattr(self, name)}.")
        if self.num_blocks > 1000:  # counting their widths would take all memory
            raise UserError(f"network.num_blocks must be at most 1000, and is {self.num_blocks}.")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise UserError(f"network.channel_mult must name a factor per level, and is {tuple(self.channel_mult)}.")
        for name, mult in (("channel_mult", max(self.channel_mult)), ("channel_mult_emb", self.channel_mult_emb)):
            if self.model_channels * mult > _MAX_CHANNELS:
                raise UserError(
                    f"network.model_channels = {self.model_channels} times {mult} of network.{name} must be at most "
                    f"{_MAX_CHANNELS:,}."
                )
        factor = 2 ** (len(self.channel_mult) - 1)
        if self.resolution % factor:
            raise UserError(
                f"The resolution must be divisible by {factor} for the {len(self.channel_mult)} levels of "
                f"network.channel_mult, and is {self.resolution}."
            )
        for name in ("dropout", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"network.{name} must be at least 0 and below 1, and is {getattr(self, name)}.")
        if self.model_channels % 2 or self.model_channels < 4:
            raise UserError(f"network.model_channels must be even and at least 4, and is {self.model_channels}.")
        for res in self.remat:
            if res not in self.resolutions:
                raise UserError(f"remat names the resolution {res}, and the network's are {self.resolutions}.")
        if jnp.dtype(self.dtype) == jnp.float16:
            raise UserError("network.dtype is float16, which loses the network's input at high noise: take bfloat16.")
        if self.attention not in ATTENTION:
            raise UserError(f"network.attention is {self.attention!r}: {nearest(self.attention, ATTENTION)}")
        if self.attention == "cudnn":
            widths = zip(self.resolutions, self.channel_mult, strict=True)
            attending = [mult for res, mult in widths if res in (*self.attn_resolutions, self.resolutions[-1])]
            check_cudnn(self.dtype, self.model_channels * max(attending))
        for width in self._norm_widths():
            if width % num_groups(width):
                raise UserError(
                    f"network.model_channels = {self.model_channels} with channel_mult = {tuple(self.channel_mult)} "
                    f"makes a layer of {width} channels, which GroupNorm cannot cut into {num_groups(width)} equal "
                    "groups; multiples of 32 always work, and multiples of 4 up to 128 channels do."
                )

    def _norm_widths(self) -> list[int]:
        """Channel counts that meet a GroupNorm: of every block's input and output."""
        widths, skips, width = set(), [], self.model_channels
        for mult in self.channel_mult:
            skips.append(width)  # the first convolution, or the down block
            widths.add(width)
            for _ in range(self.num_blocks):
                width = self.model_channels * mult
                widths.add(width)
                skips.append(width)
        for mult in reversed(self.channel_mult):
            for _ in range(self.num_blocks + 1):
                widths.add(width + skips.pop())
                width = self.model_channels * mult
                widths.add(width)
        return sorted(widths)

    def _check_inputs(
        self, x: jax.Array, c_noise: jax.Array, class_labels: jax.Array | None, augment_labels: jax.Array | None
    ) -> None:
        """Raise a UserError unless the shapes are those of :meth:`__call__`: many others would be broadcast, or ignored."""
        batch = x.shape[:1]
        for name, array, shape in (
            ("x", x, (*batch, self.resolution, self.resolution, self.channels)),
            ("c_noise", c_noise, batch),
            ("class_labels", class_labels, (*batch, self.label_dim)),
            ("augment_labels", augment_labels, (*batch, self.augment_dim)),
        ):
            if array is not None and array.shape != shape:
                one_hot = "one-hot, " if name == "class_labels" else ""
                raise UserError(f"{name} must be {one_hot}{list(shape)} for this network, and is {list(array.shape)}.")

    def _embedding(
        self, c_noise: jax.Array, class_labels: jax.Array | None, augment_labels: jax.Array | None, key: Any
    ) -> jax.Array:
        """Noise level, class and augmentation in one vector [B, channel_mult_emb * model_channels], float32."""
        preset = PRESETS[self.preset]
        width = self.model_channels * preset["channel_mult_noise"]
        if preset["embedding"] == "fourier":
            emb = FourierEmbedding(width, name="map_noise")(c_noise)
        else:
            emb = positional_embedding(c_noise, width)

        def dense(features: int, name: str, use_bias: bool = True) -> nn.Dense:
            return nn.Dense(features, use_bias=use_bias, kernel_init=xavier_uniform(), name=name)

        if self.label_dim:
            if class_labels is None:
                class_labels = jnp.zeros((c_noise.shape[0], self.label_dim))
            if self.label_dropout > 0 and key is not None:
                keep = jax.vmap(lambda k: jax.random.bernoulli(k, np.float32(1 - self.label_dropout)))(key)
                class_labels = class_labels * keep[:, None]
            emb = emb + dense(width, "map_label")(class_labels * math.sqrt(self.label_dim))
        if self.augment_dim:
            # Absent labels count as zeros, and their layer has no bias; it is still built at initialisation.
            if augment_labels is None and self.is_initializing():
                augment_labels = jnp.zeros((c_noise.shape[0], self.augment_dim))
            if augment_labels is not None:
                emb = emb + dense(width, "map_augment", use_bias=False)(augment_labels)
        width = self.channel_mult_emb * self.model_channels
        emb = nn.silu(dense(width, "map_layer0")(emb))
        return nn.silu(dense(width, "map_layer1")(emb))

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        *,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """Apply the network.

        Args:
          x: [B, resolution, resolution, channels].
          c_noise: [B].
          class_labels: [B, label_dim] one-hot rows; an all-zero row (or None) means "no class".
          augment_labels: [B, augment_dim], or None for zeros.
          dropout_keys: [B] random keys, one per example; None switches all dropout off.

        Returns:
          [B, resolution, resolution, channels] in ``dtype``.

        Raises:
          UserError: an array of another shape.
        """
        self._check_inputs(x, c_noise, class_labels, augment_labels)
        preset = PRESETS[self.preset]
        rematerialised = nn.remat(UNetBlock)
        taps = preset["resample_filter"]
        count = 0

        def next_keys() -> jax.Array | None:
            """A fresh key per example for each layer that draws."""
            nonlocal count
            count += 1
            if dropout_keys is None:
                return None
            return jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, count)

        def block(
            name: str, features: int, *parts: jax.Array, attention: bool = False, resample: str | None = None
        ) -> Any:
            """A block at resolution ``res``."""
            kind = rematerialised if res in self.remat else UNetBlock
            settings = (resample, taps, attention, self.dropout, self.dtype, self.attention)
            return kind(features, *settings, name=name)(parts, emb, next_keys())

        emb = self._embedding(c_noise, class_labels, augment_labels, next_keys())
        x = aux = x.astype(self.dtype)

        skips = []
        for level, (res, mult) in enumerate(zip(self.resolutions, self.channel_mult, strict=True)):
            if level == 0:
                x = Conv(self.model_channels, dtype=self.dtype, name=f"enc_{res}x{res}_conv")(x)
            else:
                x = block(f"enc_{res}x{res}_down", x.shape[-1], x, resample="down")
                if preset["residual"]:
                    shrink = Conv(
                        x.shape[-1], 3, "down", taps, fused=True, dtype=self.dtype, name=f"enc_{res}x{res}_aux_residual"
                    )
                    x = aux = (x + shrink(aux)) * jnp.asarray(SQRT_HALF, x.dtype)
            skips.append(x)
            for i in range(self.num_blocks):
                features = self.model_channels * mult
                x = block(f"enc_{res}x{res}_block{i}", features, x, attention=res in self.attn_resolutions)
                skips.append(x)

        for res, mult in reversed(list(zip(self.resolutions, self.channel_mult, strict=True))):
            if res == self.resolutions[-1]:
                x = block(f"dec_{res}x{res}_in0", x.shape[-1], x, attention=True)
                x = block(f"dec_{res}x{res}_in1", x.shape[-1], x)
            else:
                x = block(f"dec_{res}x{res}_up", x.shape[-1], x, resample="up")
            for i in range(self.num_blocks + 1):
                attention = i == self.num_blocks and res in self.attn_resolutions
                features = self.model_channels * mult
                x = block(f"dec_{res}x{res}_block{i}", features, x, skips.pop(), attention=attention)

        res = self.resolution
        x = nn.silu(group_norm(x.shape[-1], self.dtype, f"dec_{res}x{res}_aux_norm")(x))
        return Conv(self.channels, init_scale=1e-5, dtype=self.dtype, name=f"dec_{res}x{res}_aux_conv")(x)
