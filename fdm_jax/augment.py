"""Geometric augmentation with nine labels: what was done to a training image must not leak into samples.

Section F.2 of Karras et al. 2022 (arXiv 2206.00364), which took the geometry from StyleGAN2-ADA (Karras et
al. 2020, arXiv 2006.06676).  Each image is flipped, scaled, turned, stretched and shifted at random, and the
network is told how by nine numbers; at sampling time these are nine zeros, and it draws unaugmented images.

=====  ==============  ===================================================================================
index  label           meaning
=====  ==============  ===================================================================================
0      xflip           1 if mirrored left to right (always considered: one image in two)
1      yflip           1 if mirrored top to bottom (one in two of those chosen)
2      w_s             isotropic scale by 2^(0.2 w_s), w_s ~ N(0, 1)
3, 4   cos th - 1,     rotation by th ~ U(-pi, pi)
       sin th
5, 6   w_a cos r,      stretch by 2^(0.2 w_a) along an axis at angle r and by the inverse across it,
       w_a sin r       w_a ~ N(0, 1), r ~ U(-pi, pi) for one in two and 0 for the other
7, 8   w_x, w_y        shift by an eighth of the width times w_x and of the height times w_y, both N(0, 1)
=====  ==============  ===================================================================================

All but the x-flip are chosen, each by its own test, with probability p; what is not chosen is zero.

The geometry is one resampling at twice the resolution, between the two halves of an orthogonal wavelet filter
(sym6) which together change nothing: an image that is only flipped comes out as it went in, within rounding.
Everything here is a pure function of one image and its own draws, mapped over the batch, hence safe to shard
along it.  The steps before and after the resampling act on one axis at a time, so each is a product with a
small constant matrix (reflection, zero insertion, filter and crop folded into one); only the resampling
gathers.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.errors import UserError

LABELS = ("xflip", "yflip", "w_s", "cos th - 1", "sin th", "w_a cos r", "w_a sin r", "w_x", "w_y")
NUM_LABELS = len(LABELS)

# Low-pass decomposition filter of the sym6 wavelet; its sum is sqrt(2).
_SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip

# The default precision of a matrix product is about three digits on an accelerator: too few for pixels.
_PRECISION = jax.lax.Precision.HIGHEST


class AugmentDraws(NamedTuple):
    """The raw random numbers of one example before anything is chosen (of a batch: a leading axis on each).

    ``*_u`` are U[0, 1) and decide whether something is chosen; the others say what is done if it is.
    """

    xflip: jax.Array  # int32, 0 or 1
    yflip: jax.Array  # int32, 0 or 1
    yflip_u: jax.Array
    scale_w: jax.Array  # N(0, 1)
    scale_u: jax.Array
    rotate_w: jax.Array  # U[0, 1), th = (2 rotate_w - 1) pi
    rotate_u: jax.Array
    aniso_w: jax.Array  # N(0, 1)
    aniso_r: jax.Array  # U[0, 1), r = (2 aniso_r - 1) pi
    aniso_u: jax.Array
    aniso_ru: jax.Array  # decides, at 1/2, whether the stretch has an axis of its own
    translate_w: jax.Array  # [..., 2], N(0, 1): x, y
    translate_u: jax.Array


class Transform(NamedTuple):
    """What is done to one example, all zero for nothing; float32 (of a batch: a leading axis on each)."""

    xflip: jax.Array  # 0 or 1
    yflip: jax.Array  # 0 or 1
    scale: jax.Array  # w_s, in fifths of an octave
    angle: jax.Array  # th, radians
    stretch: jax.Array  # w_a, in fifths of an octave
    axis: jax.Array  # r, radians
    shift: jax.Array  # [..., 2]: w_x, w_y, in eighths of the image's width, height


def draw(key: jax.Array) -> AugmentDraws:
    """Draw the random numbers of one example from its own key (``jax.vmap`` it over keys [B])."""
    uniform_key, normal_key = jax.random.split(key)
    uniform = jax.random.uniform(uniform_key, (10,), dtype=jnp.float32)
    normal = jax.random.normal(normal_key, (4,), dtype=jnp.float32)
    flips = (uniform[:2] < 0.5).astype(jnp.int32)
    return AugmentDraws(
        xflip=flips[0],
        yflip=flips[1],
        yflip_u=uniform[2],
        scale_w=normal[0],
        scale_u=uniform[3],
        rotate_w=uniform[4],
        rotate_u=uniform[5],
        aniso_w=normal[1],
        aniso_r=uniform[6],
        aniso_u=uniform[7],
        aniso_ru=uniform[8],
        translate_w=normal[2:],
        translate_u=uniform[9],
    )


def choose(draws: AugmentDraws, p: float) -> Transform:
    """Choose, from raw draws of any leading shape, what is done: each part with probability ``p`` in [0, 1].

    With p = 0 nothing is done, not even the x-flip, which any other p considers for every example.
    """
    p = _probability(p)

    def if_chosen(u, value, probability=p):
        return jnp.where(u < probability, value, jnp.zeros_like(value))

    yflip, xflip = draws.yflip.astype(jnp.float32), draws.xflip.astype(jnp.float32)
    axis = if_chosen(draws.aniso_ru, (2 * draws.aniso_r - 1) * math.pi, 0.5)
    return Transform(
        xflip=xflip if p > 0 else jnp.zeros_like(xflip),
        yflip=if_chosen(draws.yflip_u, yflip),
        scale=if_chosen(draws.scale_u, draws.scale_w),
        angle=if_chosen(draws.rotate_u, (2 * draws.rotate_w - 1) * math.pi),
        stretch=if_chosen(draws.aniso_u, draws.aniso_w),
        axis=if_chosen(draws.aniso_u, axis),
        shift=if_chosen(draws.translate_u[..., None], draws.translate_w),
    )


def labels(transform: Transform) -> jax.Array:
    """The nine labels [..., 9] that tell the network of a transform, in the order of :data:`LABELS`."""
    t = transform
    columns = (
        t.xflip, t.yflip, t.scale, jnp.cos(t.angle) - 1, jnp.sin(t.angle),
        t.stretch * jnp.cos(t.axis), t.stretch * jnp.sin(t.axis), t.shift[..., 0], t.shift[..., 1],
    )  # fmt: skip
    return jnp.stack(columns, axis=-1)


def apply(image: jax.Array, transform: Transform) -> jax.Array:
    """Apply one transform to one image [H, W, C] (float32), reflected beyond its edges and zero beyond those.

    Flip, double each axis, resample bilinearly, halve each axis.  With positions measured from the image's
    centre in pixels, x right and y down, the output at q shows the input at

        M q = S(1/s, 1/s) R(th) R(-r) S(1/a, a) R(r) T(-0.125 W w_x, -0.125 H w_y) q,

    s = 2^(0.2 w_s), a = 2^(0.2 w_a), S a scale, R(t) = [[cos t, -sin t], [sin t, cos t]], T a translation.
    """
    height, width, _ = image.shape
    image = jnp.where(transform.xflip > 0, image[:, ::-1], image)
    image = jnp.where(transform.yflip > 0, image[::-1], image)
    up_y, up_x = _doubling(height), _doubling(width)
    down_y, down_x = _halving(height), _halving(width)
    fine = jnp.einsum("ph,hwc->pwc", up_y, image, precision=_PRECISION)
    fine = jnp.einsum("qw,pwc->pqc", up_x, fine, precision=_PRECISION)
    y, x = _source_positions(transform, height, width)
    fine = _bilinear(fine, y + (up_y.shape[0] - 1) / 2, x + (up_x.shape[0] - 1) / 2)
    image = jnp.einsum("hp,pqc->hqc", down_y, fine, precision=_PRECISION)
    return jnp.einsum("wq,hqc->hwc", down_x, image, precision=_PRECISION)


def augment(images: jax.Array, draws: AugmentDraws, p: float) -> tuple[jax.Array, jax.Array]:
    """Augment images with given random numbers: a pure function of each image and its own draws.

    Args:
        images: [B, H, W, C] in [-1, 1], any floating dtype, H and W at least 2.
        draws: raw random numbers with leading axis [B].
        p: probability of each part, a Python number in [0, 1]; 0 returns the images untouched.

    Returns:
        Augmented images [B, H, W, C], float32 (not clipped: the filters ring beyond [-1, 1] at sharp edges),
        and labels [B, 9], float32.

    Raises:
        UserError: ``p`` is not a probability, or ``images`` is not a batch of images of a floating dtype.
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating) or min(images.shape[1:3]) < 2:
        raise UserError(
            f"augment: images are {images.dtype} of shape {tuple(images.shape)}: give floating-point images "
            "[B, H, W, C] with H and W at least 2, scaled to [-1, 1]."
        )
    images = images.astype(jnp.float32)
    transform = choose(draws, p)
    if p > 0:
        images = jax.vmap(apply)(images, transform)
    return images, labels(transform)


def augment_with_keys(keys: jax.Array, images: jax.Array, p: float) -> tuple[jax.Array, jax.Array]:
    """:func:`augment` with draws from ``keys`` [B], one key per example: none depends on the others."""
    return augment(images, jax.vmap(draw)(keys), p)


def _probability(p: float) -> float:
    # not (...) rather than the reverse comparisons, so that a NaN is refused as well
    if not 0 <= p <= 1:
        raise UserError(f"augment: p is {p}: give a probability from 0 (no augmentation) to 1.")
    return float(p)


def _source_positions(transform: Transform, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Where to sample the doubled image: y and x, [2 H + 10, 2 W + 10], in its pixels from its centre.

    On doubled axes the map is M' = T(-1/2, -1/2) S(2, 2) M S(1/2, 1/2) T(1/2, 1/2); with M q = A (q + t) this
    is A (q + 1/2 + 2 t) - 1/2.  The halves are there because zero insertion puts a pixel at the first of its
    two places, half a doubled pixel before its centre.
    """
    # By hand in scalars: a 2 x 2 matrix product would go through the accelerator's low-precision matrix unit.
    cos_r, sin_r = jnp.cos(transform.axis), jnp.sin(transform.axis)
    cos_d, sin_d = jnp.cos(transform.angle - transform.axis), jnp.sin(transform.angle - transform.axis)
    along = jnp.exp2(-0.2 * (transform.scale + transform.stretch))  # 1 / (s a)
    across = jnp.exp2(-0.2 * (transform.scale - transform.stretch))  # a / s
    xx = along * cos_d * cos_r - across * sin_d * sin_r
    xy = -along * cos_d * sin_r - across * sin_d * cos_r
    yx = along * sin_d * cos_r + across * cos_d * sin_r
    yy = -along * sin_d * sin_r + across * cos_d * cos_r
    x = _centred(2 * width + 10)[None, :] + (0.5 - 0.25 * width * transform.shift[0])
    y = _centred(2 * height + 10)[:, None] + (0.5 - 0.25 * height * transform.shift[1])
    return yx * x + yy * y - 0.5, xx * x + xy * y - 0.5


def _centred(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2)


def _bilinear(image: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Sample ``image`` [P, Q, C] at rows ``y`` and columns ``x`` [...]; beyond its edges, their value.

    The edges that :func:`_doubling` makes are zero, so clipping the position gives zero outside, and the fade
    to zero within the last pixel, without a mask.
    """
    rows, columns, channels = image.shape
    y, x = jnp.clip(y, 0, rows - 1), jnp.clip(x, 0, columns - 1)
    top, left = jnp.minimum(jnp.floor(y), rows - 2), jnp.minimum(jnp.floor(x), columns - 2)
    down, right = (y - top)[..., None], (x - left)[..., None]
    index = top.astype(jnp.int32) * columns + left.astype(jnp.int32)
    flat = image.reshape(rows * columns, channels)

    def tap(offset):
        return flat.at[index + offset].get(mode="promise_in_bounds")  # promised by the clipping above

    upper = tap(0) * (1 - right) + tap(1) * right
    lower = tap(columns) * (1 - right) + tap(columns + 1) * right
    return upper * (1 - down) + lower * down


@functools.cache
def _doubling(n: int) -> np.ndarray:
    """Matrix [6 n - 2, n] that reflects an axis, doubles it, and sets a zero at each end.

    Reflection by n - 1 on each side (an edge pixel is not repeated) makes m = 3 n - 2 pixels, and serves any
    transform.  After zero insertion 2 m - 1 + 6 + 6 samples are correlated with the 12 reversed taps: 2 m.
    """
    reflected = np.pad(np.eye(n), ((n - 1, n - 1), (0, 0)), mode="reflect")
    m = len(reflected)
    spread = np.zeros((2 * m + 11, n))
    spread[6 : 6 + 2 * m - 1 : 2] = reflected
    doubled = np.stack([_SYM6[::-1] @ spread[i : i + 12] for i in range(2 * m)])
    return np.pad(doubled, ((1, 1), (0, 0))).astype(np.float32)


@functools.cache
def _halving(n: int) -> np.ndarray:
    """Matrix [n, 2 n + 10] that correlates an axis with the taps at stride 2.

    The original halves 2 (n + 6) samples, padded by 5 zeros, and cuts 3 results from each end.  What is left
    uses neither the zeros nor the outermost samples, so these are not made in the first place.
    """
    matrix = np.zeros((n, 2 * n + 10), np.float32)
    for i in range(n):
        matrix[i, 2 * i : 2 * i + 12] = _SYM6
    return matrix
