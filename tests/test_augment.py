"""The augmentation: golden numbers of the original, exact shifts, statistics of the draws, independence.

``golden/augment.npz`` holds the original's numbers for the first eight images of each case: raw draws as
PyTorch made them (``draw_*``), NCHW images in and out, labels.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nhwc
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fdm_jax import augment
from fdm_jax.errors import UserError

CASES = (
    "p012", "p015", "p05", "p1", "only_identity", "only_xflip", "only_yflip", "only_scale", "only_rotate",
    "only_aniso_norot", "only_aniso_rot", "only_translate", "only_rot180", "only_big_translate", "gray8_p05",
    "rect16x24_p1",
)  # fmt: skip

# p is static, as in a training step; cases of one p and one shape share a compilation
draw_jit = jax.jit(jax.vmap(augment.draw))
augment_jit = jax.jit(augment.augment, static_argnums=2)
augment_with_keys_jit = jax.jit(augment.augment_with_keys, static_argnums=2)


def keys_of(seed, count=8):
    return jax.random.split(jax.random.key(seed), count)


def nothing(**given):
    """One example's draws under which any p < 0.9 does nothing, except for what is given."""
    zero = jnp.zeros((), jnp.float32)
    draws = {name: zero for name in augment.AugmentDraws._fields}
    draws |= {name: zero + 0.9 for name in draws if name.endswith("_u") or name == "aniso_ru"}
    draws |= {"xflip": jnp.zeros((), jnp.int32), "yflip": jnp.zeros((), jnp.int32)}
    draws |= {"translate_w": jnp.zeros((2,), jnp.float32)} | given
    return augment.AugmentDraws(**draws)


def random_images(count, *shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


def golden_case(arrays, case):
    """Images, draws and p of a case, and the outcome and labels to expect."""
    expected = nhwc(arrays[f"{case}/out"])
    n = len(expected)
    name = f"{case}/images"
    images = nhwc(arrays[name] if name in arrays else arrays["images_8x3x32x32"][:n])
    original = {field: arrays[f"{case}/draw_{field}"] for field in augment.AugmentDraws._fields if "flip" not in field}
    draws = {field: value.reshape(n) for field, value in original.items() if field != "translate_w"}
    draws["translate_w"] = original["translate_w"].T
    draws["yflip_u"] = arrays[f"{case}/draw_yflip_u"].reshape(n)
    for flip in ("xflip", "yflip"):
        draws[flip] = arrays[f"{case}/draw_{flip}_w"].reshape(n).astype(np.int32)
    draws = jax.tree.map(jnp.asarray, augment.AugmentDraws(**draws))
    return images, draws, float(arrays[f"{case}/p"]), expected, arrays[f"{case}/labels"]


@pytest.mark.parametrize("case", CASES)
def test_golden(golden, case):
    images, draws, p, expected, expected_labels = golden_case(golden("augment"), case)
    out, labels = augment_jit(jnp.asarray(images), draws, p)
    assert out.dtype == labels.dtype == jnp.float32
    np.testing.assert_allclose(labels, expected_labels, rtol=0, atol=1e-6)
    # the original reflects by what the batch needs, ours always by size - 1: up to 1.7e-4 apart
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-4)


def test_every_golden_case_is_tested(golden):
    assert {name.split("/")[0] for name in golden("augment").files if "/" in name} == set(CASES)


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 12, 3), (9, 7, 3)])
def test_whole_pixel_shift_is_exact(shape):
    """A shift by whole pixels is numpy's reflection; a label of 1 is an eighth of the size, right or down."""
    height, width, _ = shape
    images = random_images(1, *shape)
    dy, dx = -3, 2
    w = jnp.array([8 * dx / width, 8 * dy / height], jnp.float32)
    draws = nothing(translate_w=w, translate_u=jnp.zeros((), jnp.float32))
    out, labels = augment_jit(images, jax.tree.map(lambda leaf: leaf[None], draws), 0.5)
    padded = np.pad(images[0], ((0, 3), (2, 0), (0, 0)), mode="reflect")
    np.testing.assert_allclose(out[0], padded[3:, :width], atol=1e-5)
    np.testing.assert_allclose(labels[0], [0] * 7 + [8 * dx / width, 8 * dy / height], atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_flips_are_exact(channels):
    images = random_images(4, 8, 8, channels)
    draws = [
        nothing(xflip=jnp.int32(x), yflip=jnp.int32(y), yflip_u=jnp.float32(0)) for y in range(2) for x in range(2)
    ]
    out, labels = augment_jit(images, jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws), 0.5)
    expected = [images[0], images[1][:, ::-1], images[2][::-1], images[3][::-1, ::-1]]
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(labels[:, :2], [[0, 0], [1, 0], [0, 1], [1, 1]])


def test_channels_are_treated_alike():
    draws = draw_jit(keys_of(1))
    images = random_images(8, 8, 8, 3)
    out, _ = augment_jit(images, draws, 1.0)
    for c in range(3):
        one, _ = augment_jit(images[..., c : c + 1], draws, 1.0)
        np.testing.assert_allclose(out[..., c : c + 1], one, atol=2e-5)


def transforms(p, count=20_000):
    return augment.choose(draw_jit(keys_of(7, count)), p)


def test_draws_are_chosen_with_probability_p():
    p, count = 0.12, 20_000
    chosen = transforms(p, count)
    shares = {
        "xflip": (0.5, chosen.xflip),
        "yflip": (p / 2, chosen.yflip),
        "scale": (p, chosen.scale),
        "angle": (p, chosen.angle),
        "stretch": (p, chosen.stretch),
        "axis": (p / 2, chosen.axis),
        "shift x": (p, chosen.shift[:, 0]),
        "shift y": (p, chosen.shift[:, 1]),
    }
    for name, (share, values) in shares.items():
        seen = np.mean(np.asarray(values) != 0)
        assert abs(seen - share) < 4.5 * np.sqrt(share * (1 - share) / count), name
    # one test for both directions, and no axis without a stretch
    np.testing.assert_array_equal(chosen.shift[:, 0] != 0, chosen.shift[:, 1] != 0)
    assert not np.any((np.asarray(chosen.axis) != 0) & (np.asarray(chosen.stretch) == 0))
    # else the tests are independent: none but the flip is chosen as often as (1 - p)^4 says
    none = ~np.any(np.asarray(augment.labels(chosen))[:, 2:], axis=1)
    assert abs(none.mean() - (1 - p) ** 4) < 4.5 * np.sqrt((1 - p) ** 4 * (1 - (1 - p) ** 4) / count)


def test_draws_have_their_distributions():
    chosen = jax.tree.map(np.asarray, transforms(1.0))
    for values in (chosen.scale, chosen.stretch, chosen.shift[:, 0], chosen.shift[:, 1]):
        assert abs(values.mean()) < 0.035 and abs(values.std() - 1) < 0.025
    for values in (chosen.angle, chosen.axis[chosen.axis != 0]):
        assert values.min() > -np.pi - 1e-6 and values.max() < np.pi + 1e-6
        assert abs(values.mean()) < 0.09 and abs(values.std() - np.pi / np.sqrt(3)) < 0.05
    columns = [
        chosen.xflip,
        chosen.yflip,
        chosen.scale,
        chosen.angle,
        chosen.stretch,
        chosen.axis,
        *chosen.shift.T,
    ]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 0.035
    assert chosen.scale.dtype == chosen.xflip.dtype == np.float32


def test_a_key_gives_its_draws_in_any_batch():
    keys = keys_of(3)
    batch, alone = draw_jit(keys), draw_jit(keys[2:3])
    jax.tree.map(lambda b, a: np.testing.assert_array_equal(b[2], a[0]), batch, alone)


def test_p_zero_does_nothing_and_p_one_everything():
    draws = draw_jit(keys_of(0))
    images = random_images(8, 8, 8, 3)
    out, labels = augment_jit(images, draws, 0.0)
    np.testing.assert_array_equal(out, images)
    np.testing.assert_array_equal(labels, np.zeros((8, augment.NUM_LABELS)))
    out, labels = augment_jit(images, draws, 1.0)
    assert np.all(np.asarray(labels)[:, [2, 3, 4, 5, 7, 8]] != 0)
    assert np.all(np.abs(out - images).max(axis=(1, 2, 3)) > 0.1)


def test_an_example_does_not_depend_on_the_others():
    keys = keys_of(5)
    images = random_images(8, 8, 8, 3)
    out, labels = augment_with_keys_jit(keys, images, 1.0)
    # other companions, same place: bit for bit; NaN would spread through any sum over the batch
    others = np.full_like(images, np.nan)
    others[3] = images[3]
    other_out, other_labels = augment_with_keys_jit(keys_of(6).at[3].set(keys[3]), others, 1.0)
    np.testing.assert_array_equal(other_out[3], out[3])
    np.testing.assert_array_equal(other_labels[3], labels[3])
    # alone: another compilation, so equal within rounding
    alone, alone_labels = augment_jit(images[3:4], draw_jit(keys[3:4]), 1.0)
    np.testing.assert_allclose(alone[0], out[3], atol=2e-5)
    np.testing.assert_allclose(alone_labels[0], labels[3], atol=1e-6)


def test_sharded_over_the_batch_without_communication():
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    keys = keys_of(5)
    images = random_images(8, 8, 8, 3)
    step = jax.jit(lambda k, i: augment.augment_with_keys(k, i, 1.0), in_shardings=sharding, out_shardings=sharding)
    compiled = step.lower(keys, images).compile()
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", compiled.as_text())
    out, labels = compiled(jax.device_put(keys, sharding), jax.device_put(images, sharding))
    expected, expected_labels = augment_with_keys_jit(keys, images, 1.0)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_allclose(labels, expected_labels, atol=1e-6)


def test_half_precision_images_are_augmented_in_single():
    draws = draw_jit(keys_of(1))
    images = jnp.asarray(random_images(8, 8, 8, 3)).astype(jnp.bfloat16)
    out, labels = augment_jit(images, draws, 1.0)
    expected, _ = augment_jit(images.astype(jnp.float32), draws, 1.0)
    assert out.dtype == labels.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_must_be_a_probability(p):
    with pytest.raises(UserError, match="p is .*probability from 0"):
        augment.augment(np.zeros((8, 8, 8, 3), np.float32), draw_jit(keys_of(0)), p)


@pytest.mark.parametrize(
    "images",
    [np.zeros((8, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 1, 8, 3), np.float32)],
)
def test_images_must_be_a_float_batch(images):
    with pytest.raises(UserError, match=re.escape("[B, H, W, C]")):
        augment.augment(images, draw_jit(keys_of(0)), 0.5)
