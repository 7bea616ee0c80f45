"""The U-Nets against the original's: units, whole networks with gradients, parameter counts, bad shapes."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, enable_x64, nhwc

from fdm_jax.errors import UserError
from fdm_jax.interop.state_dict import from_torch
from fdm_jax.networks import SongUNet
from fdm_jax.networks.blocks import Attention, Conv, UNetBlock, attend, dropout, group_norm, hashed_bits
from fdm_jax.networks.embeddings import FourierEmbedding, fourier_embedding, positional_embedding
from fdm_jax.networks.resample import downsample, upsample


def hwio(weight):
    return np.transpose(weight, (2, 3, 1, 0))


@pytest.mark.parametrize("channels", [4, 8, 16, 32, 48, 96, 128, 160, 256])
def test_golden_group_norm(golden, channels):
    data = {
        key: golden("net_units")[f"groupnorm_{channels}/{key}"] for key in ("x", "weight", "bias", "num_groups", "y")
    }
    module = group_norm(channels, jnp.float32, None)
    assert module.num_groups == data["num_groups"]
    y = module.apply({"params": {"scale": data["weight"], "bias": data["bias"]}}, nhwc(data["x"]))
    np.testing.assert_allclose(y, nhwc(data["y"]), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("cut", [None, 10])
def test_group_norm_is_that_of_flax(dtype, cut):
    """Values and derivatives, where the mean is ten times the spread, and a group may lie in two parts."""
    x = (1 + 0.1 * jax.random.normal(jax.random.key(0), (2, 5, 4, 24))).astype(dtype)
    ours = group_norm(24, dtype, None)
    flax = nn.GroupNorm(ours.num_groups, epsilon=1e-6, dtype=dtype, use_fast_variance=False)
    params = {"params": {"scale": jnp.linspace(0.5, 2, 24), "bias": jnp.linspace(-1, 1, 24)}}
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(flax.init(jax.random.key(0), x))

    def all_of(module):
        def apply(params, x):
            parts = {"parts": [x[..., :cut], x[..., cut:]]} if cut and module is ours else {}
            return module.apply(params, x, **parts)

        y, pull = jax.vjp(apply, params, x)
        assert y.dtype == dtype
        return y, pull(jnp.cos(y)), jax.jvp(lambda x: apply(params, x), (x,), (x**2,))

    for a, b in zip(jax.tree.leaves(all_of(ours)), jax.tree.leaves(all_of(flax)), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=(2e-2 if dtype == jnp.bfloat16 else 2e-5) * np.abs(b).max())


@pytest.mark.device
@pytest.mark.parametrize("mean", [0.0, 30.0, 3000.0])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_group_norm_of_bfloat16_against_float64(mean, spread):
    """One-pass sums lose nothing that the rounding of the values has left, however far the mean is from zero."""
    x = (mean + spread * jax.random.normal(jax.random.key(0), (2, 16, 16, 8))).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64).reshape(2, 16, 16, 2, 4)
    centre, variance = (f(exact, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    y, _ = group_norm(8, jnp.float32, None).init_with_output(jax.random.key(0), x)
    # What the rounding of the values alone may move: half a unit in the last of 8 bits, in spreads with eps.
    noise = 2.0**-9 * (np.abs(exact) / np.sqrt(variance + 1e-6)).max()
    np.testing.assert_allclose(
        y.reshape(exact.shape), (exact - centre) / np.sqrt(variance + 1e-6), atol=1e-4 + 0.05 * noise
    )


@pytest.mark.device
@pytest.mark.parametrize("mean, tolerance", [(1.0, 1e-5), (1000.0, 1e-3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_norm_of_shifted_values_against_float64(dtype, mean, tolerance):
    """The shift is not rounded to the type of the values, nor are small differences lost between large sums."""
    key_x, key_shift = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (2, 16, 16, 8)).astype(dtype)
    shift = mean + jax.random.normal(key_shift, (2, 8))
    exact = np.asarray(x, np.float64) + np.asarray(shift, np.float64)[:, None, None, :]
    exact = exact.reshape(2, 16, 16, 2, 4)
    centre, variance = (f(exact, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
    y, _ = group_norm(8, jnp.float32, None).init_with_output(jax.random.key(0), x, shift)
    np.testing.assert_allclose(y.reshape(exact.shape), (exact - centre) / np.sqrt(variance + 1e-6), atol=tolerance)


@pytest.fixture(params=["tpu", "default"])
def formulation(request, monkeypatch):
    """What is computed in one way on TPUs and in another elsewhere, in either way."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *x, **formulations: formulations[request.param](*x))


@pytest.mark.usefixtures("formulation")
@pytest.mark.parametrize("fused", ["plain", "fused"])
@pytest.mark.parametrize("kernel", [0, 1, 3])
@pytest.mark.parametrize("resample", ["none", "up", "down"])
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_golden_resampling_convolution(golden, taps, resample, kernel, fused):
    data = golden("net_units")
    prefix = f"conv_{''.join(map(str, taps))}_{resample}_k{kernel}_{fused}"
    if f"{prefix}/y" not in data:
        assert resample == "none" or fused == "fused" and kernel == 0  # the combinations the original cannot build
        return
    x, y = nhwc(data[f"{prefix}/x"]), nhwc(data[f"{prefix}/y"])
    if kernel == 0:
        out = {"up": upsample, "down": downsample}[resample](x, taps)
    else:
        module = Conv(6, kernel, None if resample == "none" else resample, taps, fused == "fused")
        out = module.apply({"params": {"kernel": hwio(data[f"{prefix}/weight"]), "bias": data[f"{prefix}/bias"]}}, x)
    np.testing.assert_allclose(out, y, atol=1e-5)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
@pytest.mark.parametrize("resample", [downsample, upsample])
def test_only_tpus_resample_by_matrices(resample, taps):
    def backward(x, g):
        return jax.vjp(lambda x: resample(x, taps), x)[1](g)

    x = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
    traced = jax.jit(backward).trace(x, resample(x, taps))
    for platform, products in (("tpu", 2), ("cpu", 0), ("cuda", 0)):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("dot_general") == products


def test_only_tpus_make_q_k_and_v_apart():
    x = jnp.ones((2, 4, 4, 64))
    traced = jax.jit(lambda x: Attention().init_with_output(jax.random.key(0), x)[0]).trace(x)
    for platform, convolutions in (("tpu", 4), ("cpu", 2), ("cuda", 2)):
        assert traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution") == convolutions


def test_golden_embeddings(golden):
    data = golden("net_units")
    emb = positional_embedding(data["posemb_endpoint1/t"], 16)
    np.testing.assert_allclose(emb, data["posemb_endpoint1/y_swapped"], atol=2e-5)
    emb = fourier_embedding(data["fourier/t"], data["fourier/freqs"])
    # 2 pi f t reaches hundreds, where a float32 is 3e-5 coarse.
    np.testing.assert_allclose(emb, data["fourier/y_swapped"], atol=2e-4)


def test_frequencies_are_drawn_around_zero_with_deviation_16():
    freqs = FourierEmbedding(8192).init(jax.random.key(0), jnp.ones(1))["constants"]["freqs"]
    assert freqs.shape == (4096,) and abs(freqs.mean()) < 1
    np.testing.assert_allclose(freqs.std(), 16, rtol=0.05)  # its own error: 1.1 %


def test_golden_attention(golden):
    data = {key: golden("net_units")[f"attn/{key}"] for key in ("q", "k", "w", "cotangent", "dq", "dk")}
    positions = data["q"].shape[-1]

    def weights(q, k):
        """Attention to unit vectors returns its weights, a column at a time."""
        q, k = (jnp.swapaxes(a, 1, 2)[:, :, None] for a in (q, k))
        unit = jnp.eye(positions)[None, :, None]
        columns = [attend(q, k, jnp.broadcast_to(unit[..., i : i + 1], q.shape))[:, :, 0, 0] for i in range(positions)]
        return jnp.stack(columns, axis=-1)

    w, pullback = jax.vjp(weights, data["q"], data["k"])
    np.testing.assert_allclose(w, data["w"], atol=1e-5)
    dq, dk = pullback(jnp.asarray(data["cotangent"]))
    np.testing.assert_allclose(dq, data["dq"], atol=1e-5)
    np.testing.assert_allclose(dk, data["dk"], atol=1e-5)


def block_kinds(data):
    return sorted({key.split("/")[0] for key in data if key.startswith("block_")})


@pytest.mark.usefixtures("formulation")
def test_golden_blocks(golden):
    data = golden("net_units")
    kinds = block_kinds(data)
    assert len(kinds) >= 4
    for kind in kinds:
        state = {key.removeprefix(f"{kind}/sd/"): data[key] for key in data if key.startswith(f"{kind}/sd/")}
        # Inside a network the names carry the block's; put one on so that the loader is what is tested.
        params = from_torch({f"enc.b.{name}": value for name, value in state.items()})["params"]["enc_b"]
        x, y = nhwc(data[f"{kind}/x"]), nhwc(data[f"{kind}/y"])
        taps = next((f for n, f in state.items() if n.endswith("resample_filter")), np.ones((1, 1, 2, 2)))
        taps = {2: (1, 1), 4: (1, 3, 3, 1)}[taps.shape[-1]]
        resample = {True: "up", False: "down"}[y.shape[1] > x.shape[1]] if y.shape[1] != x.shape[1] else None
        module = UNetBlock(y.shape[-1], resample, taps, attention="attention" in params)
        out = jax.jit(module.apply)({"params": params}, [x], data[f"{kind}/emb"])
        np.testing.assert_allclose(out, y, atol=1e-5, err_msg=kind)


def build(config, **overrides):
    """Our network for a golden description."""
    return SongUNet(
        **{
            "resolution": config["img_resolution"],
            "channels": config["in_channels"],
            "label_dim": config["label_dim"],
            "augment_dim": config["augment_dim"],
            "preset": "ncsnpp" if config["embedding_type"] == "fourier" else "ddpmpp",
            "model_channels": config["model_channels"],
            "channel_mult": tuple(config["channel_mult"]),
            "num_blocks": config["num_blocks"],
            "attn_resolutions": tuple(config["attn_resolutions"]),
            "dropout": 0.0,
        }
        | overrides
    )


NETWORKS = {
    "net_ddpmpp_16": dict(embedding_type="positional", attn_resolutions=[16]),
    "net_ncsnpp_16": dict(embedding_type="fourier", attn_resolutions=[8]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_golden_network_and_gradients(golden, name):
    data = golden(name)
    config = (
        dict(
            img_resolution=16,
            in_channels=3,
            label_dim=10,
            augment_dim=9,
            model_channels=24,
            channel_mult=[1, 2],
            num_blocks=1,
        )
        | NETWORKS[name]
    )
    network = build(config)
    variables = from_torch({key[3:]: data[key] for key in data if key.startswith("sd/")})
    params, constants = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    x, R = nhwc(data["in/x"]), nhwc(data["in/R"])
    inputs = data["in/noise_labels"], data["in/class_labels"]

    def objective(params, x, augment_labels):
        y = network.apply({"params": params, **constants}, x, *inputs, augment_labels)
        return jnp.sum(y * R), y

    grad = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
    (_, y), (grad_params, grad_x) = grad(params, x, data["in/augment_labels"])
    np.testing.assert_allclose(y, nhwc(data["out/y"]), atol=2e-5)
    np.testing.assert_allclose(grad_x, nhwc(data["out/grad_x"]), atol=2e-5)
    y = jax.jit(network.apply)({"params": params, **constants}, x, *inputs)
    np.testing.assert_allclose(y, nhwc(data["out/y_no_augment_labels"]), atol=2e-5)

    expected = from_torch({key[5:]: data[key] for key in data if key.startswith("grad/")})["params"]
    compared = 0
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        ours = grad_params
        for part in path:
            ours = ours[part.key]
        np.testing.assert_allclose(
            ours, value, atol=2e-5 * max(1, np.abs(value).max()), err_msg=jax.tree_util.keystr(path)
        )
        compared += 1
    assert compared > 40
    # Every other parameter by its norm.
    norms = from_torch(
        {
            str(n): np.full(data[f"sd/{n}"].shape, norm)
            for n, norm in zip(data["param_names"], data["grad_norms_f64"], strict=True)
        }
    )["params"]
    for path, value in jax.tree_util.tree_leaves_with_path(norms):
        ours = grad_params
        for part in path:
            ours = ours[part.key]
        np.testing.assert_allclose(np.linalg.norm(ours), value.flat[0], rtol=1e-4, atol=2e-4, err_msg=str(path))


COUNTS = [  # method.md section 5: preset, channel_mult, resolution, label_dim, parameters
    ("ddpmpp", (2, 2, 2), 32, 10, 55_735_299),
    ("ncsnpp", (2, 2, 2), 32, 10, 56_400_643),
    ("ddpmpp", (1, 2, 2, 2), 32, 10, 61_806_979),
    ("ncsnpp", (1, 2, 2, 2), 32, 10, 62_763_907),
    ("ddpmpp", (1, 2, 2, 2), 64, 0, 61_805_571),
    ("ncsnpp", (1, 2, 2, 2), 64, 0, 62_761_091),
]


@pytest.mark.parametrize("preset,mult,resolution,labels,count", COUNTS)
def test_parameter_counts(preset, mult, resolution, labels, count):
    network = SongUNet(resolution, 3, labels, 9, preset, 128, mult)
    image = jax.ShapeDtypeStruct((1, resolution, resolution, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image, jax.ShapeDtypeStruct((1,), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count
    assert ("constants" in variables) == (preset == "ncsnpp")


def test_initialisation_is_nearly_zero_and_of_the_right_spread(tiny_network):
    network, variables = tiny_network
    y = jax.jit(network.apply)(variables, jnp.ones((2, 8, 8, 1)), jnp.zeros(2))
    assert float(jnp.abs(y).max()) < 1e-3
    scales = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        *modules, kind = (key.key for key in path)
        if kind != "kernel":
            np.testing.assert_array_equal(leaf, kind == "scale")
            continue
        small = modules[-1] in ("conv1", "proj") or modules == ["dec_8x8_aux_conv"]
        scales.add(scale := 1e-5 if small else 0.2**0.5 if modules[-1] == "qkv" else 1)
        # Xavier's, with the fans over the whole window.
        spread = scale * (2 / math.prod(leaf.shape[:-2]) / sum(leaf.shape[-2:])) ** 0.5
        assert float(leaf.std()) == pytest.approx(spread, rel=5 * (0.2 / leaf.size) ** 0.5), path  # 5 of its own errors
        assert float(jnp.abs(leaf).max()) <= 3**0.5 * spread * (1 + 1e-6), path  # uniform
    assert scales == {1e-5, 0.2**0.5, 1}


@pytest.fixture(scope="module")
def tiny_network():
    network = SongUNet(
        8, 1, 3, 0, "ddpmpp", 8, (1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.3, label_dropout=0.5
    )
    return network, jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))


def test_dropout_of_an_example_does_not_depend_on_its_batch(tiny_network):
    network, variables = tiny_network
    params = jax.tree.map(lambda p: p + 0.05, variables)
    keys = jax.random.split(jax.random.key(1), 4)
    x = jax.random.normal(jax.random.key(2), (4, 8, 8, 1))
    labels = jax.nn.one_hot(jnp.asarray([0, 1, 2, 0]), 3)
    apply = jax.jit(lambda x, labels, keys: network.apply(params, x, jnp.ones(x.shape[0]), labels, dropout_keys=keys))
    whole = apply(x, labels, keys)
    np.testing.assert_allclose(apply(x[1:3], labels[1:3], keys[1:3]), whole[1:3], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(apply(x, labels, keys[::-1]) - whole).max()) > 1e-3


def test_dropout_is_unbiased():
    rate, shape = 0.13, (64, 16, 16, 32)
    y = np.asarray(dropout(jnp.ones(shape), rate, jax.random.split(jax.random.key(0), 64)))
    kept = y != 0
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=1e-6)
    sd = np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 4 * sd / np.sqrt(y.size)
    assert dropout(jnp.ones((1, 2), jnp.bfloat16), rate, jax.random.split(jax.random.key(0), 1)).dtype == jnp.bfloat16
    for axis in range(4):  # shares within slices spread as those of independent draws do, no more and no less
        slices = np.moveaxis(kept, axis, 0).reshape(shape[axis], -1)
        scores = (slices.mean(axis=1) - (1 - rate)) / (sd / np.sqrt(slices.shape[1]))
        assert abs(scores).max() < 4 and 0.5 < scores.std() < 1.5


def test_dropout_is_the_same_in_double_precision(tiny_network):
    network, variables = tiny_network
    params = jax.tree.map(lambda p: p + 0.05, variables)
    keys, x = jax.random.split(jax.random.key(1), 4), np.ones((4, 8, 8, 1), np.float32)

    def output():
        apply = jax.jit(network.apply)
        return np.asarray(apply(params, x, np.ones(4), np.eye(3)[[0, 1, 2, 0]], dropout_keys=keys))

    single = output()
    with enable_x64():
        np.testing.assert_allclose(output(), single, rtol=1e-3)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.13, 0.25])
def test_dropout_is_unbiased_in_bfloat16(rate):
    """Rounding is to either side: over many values the scale of those kept is 1 / (1 - rate) to 2e-4."""
    x = jax.random.normal(jax.random.key(1), (4, 64, 64, 16)).astype(jnp.bfloat16)
    y = np.asarray(dropout(x, rate, jax.random.split(jax.random.key(0), 4)), np.float64)
    x = np.where(y != 0, np.asarray(x, np.float64), 0)
    assert (x * y).sum() / (x * x).sum() * (1 - rate) == pytest.approx(1, abs=2e-4)


@pytest.mark.device
def test_hashed_bits_mix_place_and_words_as_murmur_does():
    def mix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    assert mix(1) == 0x514E28B7  # as its author's code gives it
    bits = hashed_bits(jnp.asarray([5, 2**32 - 7], jnp.uint32), (2, 3, 4))
    assert bits.ravel().tolist() == [mix(mix(place ^ 5) ^ (2**32 - 7)) for place in range(24)]


def test_hashed_bits_of_near_words_have_nothing_in_common():
    """Words that differ by one bit, and places side by side: all 32 bits half set, and half of them differ."""
    words = np.asarray([123, 456], np.uint32)
    near = [words] + [
        words ^ (np.uint32(1) << bit) * np.eye(2, dtype=np.uint32)[k] for bit in range(32) for k in (0, 1)
    ]
    shape, hashed = (8, 8, 64), jax.jit(jax.vmap(lambda w: hashed_bits(w, (8, 8, 64))))
    bits = (np.asarray(hashed(jnp.asarray(np.stack(near))))[..., None] >> np.arange(32, dtype=np.uint32)) & 1 == 1
    bound = 5 * 0.5 / np.sqrt(np.prod(shape))
    assert abs(bits.mean(axis=(1, 2, 3)) - 0.5).max() < bound
    assert abs((bits[1:] != bits[0]).mean(axis=(1, 2, 3)) - 0.5).max() < bound
    for axis in (1, 2, 3):
        n = shape[axis - 1]
        sides = np.take(bits, range(1, n), axis) != np.take(bits, range(n - 1), axis)
        assert abs(sides.mean(axis=(1, 2, 3)) - 0.5).max() < bound * 1.2


@pytest.mark.device
def test_bfloat16_computes_close_to_float32(tiny_network):
    network, variables = tiny_network
    params = jax.tree.map(lambda p: p + 0.05, variables)
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))
    full = jax.jit(network.apply)(params, x, jnp.ones(2))
    half = jax.jit(network.clone(dtype=jnp.bfloat16).apply)(params, x, jnp.ones(2))
    assert half.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    np.testing.assert_allclose(half.astype(np.float32), full, atol=0.05 * float(jnp.abs(full).max()))


@pytest.mark.parametrize(
    "fields,message",
    [
        (dict(resolution=30, channel_mult=(1, 2, 2)), "resolution must be divisible by 4.*is 30"),
        (dict(resolution=32, model_channels=30), "model_channels = 30"),
        (dict(resolution=32, model_channels=144), "layer of 144 channels"),
        (dict(resolution=32, preset="ddpm"), "did you mean 'ddpmpp'"),
        (dict(resolution=32, channel_mult=()), "channel_mult"),
        (dict(resolution=32, dropout=1.0), "network.dropout"),
        (dict(resolution=32, dtype=jnp.float16), "take bfloat16"),
        (dict(resolution=32, label_dim=-1), "network.label_dim must be 0 or more, and is -1"),
        (dict(resolution=32, remat=(16, 12)), r"remat names the resolution 12, and the network's are \[32, 16, 8, 4\]"),
        (dict(resolution=32, attention="cuddn"), "network.attention is 'cuddn': did you mean 'cudnn'"),
        (dict(resolution=32, attention="cudnn"), "needs network.dtype = 'bfloat16', and that is 'float32'"),
        (
            dict(resolution=32, attention="cudnn", dtype=jnp.bfloat16, model_channels=160),
            "at most 256 .* there are 320",
        ),
    ],
)
def test_bad_shapes_are_refused_when_built(fields, message):
    with pytest.raises(UserError, match=message):
        SongUNet(**fields)


def test_cudnn_attention_is_refused_on_a_cpu_before_anything_is_compiled():
    network = SongUNet(8, 1, 0, 0, "ddpmpp", 8, (1,), num_blocks=1, attention="cudnn", dtype=jnp.bfloat16)
    with pytest.raises(UserError, match="'cudnn', which runs on NVIDIA GPUs only, and this is a cpu"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))


def test_rematerialised_blocks_have_the_same_parameters(tiny_network):
    network, variables = tiny_network
    shapes = jax.eval_shape(network.clone(remat=(8,)).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)


@pytest.mark.slow
def test_rematerialised_blocks_change_no_gradient(tiny_network):
    network, variables = tiny_network
    variables = jax.tree.map(lambda p: p + 0.05, variables)
    rematerialised = network.clone(remat=(8,))
    x, keys = jax.random.normal(jax.random.key(2), (4, 8, 8, 1)), jax.random.split(jax.random.key(1), 4)

    def gradients(network):
        def loss(params):
            y = network.apply(
                {"params": params}, x, jnp.ones(4), jax.nn.one_hot(jnp.arange(4) % 3, 3), dropout_keys=keys
            )
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.grad(loss))(variables["params"])

    plain, again = gradients(network), gradients(rematerialised)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * scale), plain, again)


def test_rematerialised_network_has_derivatives_forwards(tiny_network):
    """Likelihoods push tangents through the network."""
    network, variables = tiny_network
    x = jax.random.normal(jax.random.key(2), (2, 8, 8, 1))

    def push(network):
        return jax.jit(lambda x: jax.jvp(lambda x: network.apply(variables, x, jnp.ones(2)), (x,), (x,))[1])(x)

    np.testing.assert_allclose(push(network.clone(remat=(4, 8))), push(network), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"x": (10, 4, 4, 1)}, r"x must be \[10, 8, 8, 1\] for this network, and is \[10, 4, 4, 1\]"),
        ({"x": (10, 8, 8, 3)}, r"x must be \[10, 8, 8, 1\]"),
        ({"c_noise": (1,)}, r"c_noise must be \[10\]"),
        ({"class_labels": (10, 7)}, r"class_labels must be one-hot, \[10, 10\] for this network, and is \[10, 7\]"),
        ({"class_labels": (10,)}, r"class_labels must be one-hot, \[10, 10\]"),  # not one-hot: it would be broadcast
        ({"augment_labels": (10, 9)}, r"augment_labels must be \[10, 0\]"),  # they would leak into the samples
    ],
)
def test_inputs_of_another_shape_are_refused(wrong, said):
    network = SongUNet(8, 1, 10, 0, "ddpmpp", 8, (1,), num_blocks=1)
    shapes = {"x": (10, 8, 8, 1), "c_noise": (10,)} | wrong
    with pytest.raises(UserError, match=said):
        jax.eval_shape(network.init, jax.random.key(0), **{name: jnp.zeros(shape) for name, shape in shapes.items()})


def test_golden_description_matches_the_constants_above():
    """The shapes this file takes for granted are those of the stored networks."""
    for name, part in NETWORKS.items():
        names = np.load(GOLDEN / f"{name}.npz")
        assert ("sd/map_noise.freqs" in names) == (part["embedding_type"] == "fourier")
        assert json.dumps(names["sd/map_layer0.weight"].shape[0]) == "96"
