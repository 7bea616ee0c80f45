"""Operations and memory counted from shapes, against published figures and what XLA says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from fdm_jax import accounting
from fdm_jax.accounting import (
    ACCELERATORS,
    Accelerator,
    Plan,
    activation_bytes,
    count_flops,
    forward_flops,
    parameter_count,
    recomputed_flops,
    state_bytes,
    train_flops,
)
from fdm_jax.networks import SongUNet
from fdm_jax.training.step import TrainSpec, init_state


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, options.pop("strides", (1, 1)), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
    )


def test_matrix_products():
    assert count_flops(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert count_flops(jnp.matmul, shape(4, 3, 5), shape(4, 5, 7)) == 4 * 2 * 3 * 5 * 7
    assert count_flops(lambda x: jnp.tanh(x) + x**2, shape(100, 100)) == 0


def test_convolutions():
    assert count_flops(conv, shape(2, 8, 8, 3), shape(3, 3, 3, 16)) == 2 * (2 * 8 * 8 * 16) * 9 * 3
    strided = count_flops(lambda x, k: conv(x, k, strides=(2, 2)), shape(2, 8, 8, 3), shape(3, 3, 3, 16))
    assert strided == 2 * (2 * 4 * 4 * 16) * 9 * 3
    depthwise = count_flops(lambda x, k: conv(x, k, feature_group_count=6), shape(2, 8, 8, 6), shape(3, 3, 1, 6))
    assert depthwise == 2 * (2 * 8 * 8 * 6) * 9


def test_products_inside_other_programs():
    one, x = 2 * 4**3, shape(4, 4)

    def square(x):
        return x @ x

    assert count_flops(jax.jit(square), x) == one
    assert count_flops(jax.checkpoint(square), x) == one
    assert count_flops(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0], x) == 5 * one
    assert count_flops(lambda x: jax.lax.cond(x[0, 0] > 0, square, lambda x: x @ x @ x, x), x) == 2 * one
    assert count_flops(jax.nn.silu, x) == 0  # a function with a derivative of its own
    assert count_flops(lambda x: jax.vmap(lambda row: x @ row)(x), x) == one
    assert count_flops(jax.grad(lambda x, y: (x @ y).sum(), (0, 1)), x, x) == 3 * one
    with pytest.raises(ValueError, match="while loop"):
        count_flops(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, square, x), x)


@pytest.mark.parametrize(
    ("preset", "resolution", "channel_mult", "gflop"),
    [
        ("ddpmpp", 32, (2, 2, 2), 42.4),
        pytest.param("ncsnpp", 32, (2, 2, 2), 42.8, marks=pytest.mark.slow),
        pytest.param("ddpmpp", 32, (1, 2, 2, 2), 21.7, marks=pytest.mark.slow),
        pytest.param("ncsnpp", 64, (1, 2, 2, 2), 84.9, marks=pytest.mark.slow),
    ],
)
def test_published_operations(preset, resolution, channel_mult, gflop):
    """Figures of the original, up to 1.5 %: ours has no products in resampling, and upsamples after 1x1 kernels."""
    network = SongUNet(resolution, 3, 10, 9, preset, 128, channel_mult)
    counted = forward_flops(network, (resolution, resolution, 3)) / 1e9
    assert 0.985 * gflop < counted < gflop


TINY = SongUNet(8, 1, 3, 9, "ddpmpp", 8, (1,), 1, num_blocks=1, attn_resolutions=(), dropout=0.1)


def test_backward_pass_takes_twice_the_forward_pass():
    batch, inputs = 2, (shape(2, 8, 8, 1), shape(2))
    variables = jax.eval_shape(TINY.init, jax.random.key(0), *inputs)

    def loss(params, x, c_noise):
        return jnp.sum(TINY.apply({"params": params}, x, c_noise) ** 2)

    counted = count_flops(jax.grad(loss), variables["params"], *inputs)
    # Nothing asks for the gradient of the images, hence a little less.
    assert 0.95 < counted / (batch * train_flops(TINY, (8, 8, 1))) < 1


def test_state_is_what_a_step_holds():
    state = jax.eval_shape(lambda: init_state(TINY, TrainSpec(batch_size=4, learning_rate=1e-3), (8, 8, 1)))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    parameters = parameter_count(TINY, (8, 8, 1))
    assert parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    gradients, counters = 4 * parameters, held % (4 * parameters)
    assert counters < 64
    assert state_bytes(parameters) == held - counters + gradients
    assert state_bytes(parameters, accumulation=2) == held - counters + 2 * gradients


def test_activations_of_two_layers():
    """x -> tanh(x k) k: x and k are given; two results of products and tanh's, which the second reads, are kept."""

    class Layers:
        label_dim = augment_dim = 0

        def init(self, key, x, c_noise):
            return {"params": {"kernel": jnp.zeros((5, 5))}}

        def apply(self, variables, x, c_noise, class_labels, augment_labels, dropout_keys):
            kernel = variables["params"]["kernel"]
            return jnp.exp(jnp.tanh(x @ kernel) @ kernel)

    assert [activation_bytes(Layers(), (5,), batch) for batch in (3, 6)] == [3 * 3 * 5 * 4, 3 * 6 * 5 * 4]


def test_activations_against_the_compiler():
    """That for CPUs keeps more than those for accelerators, up to what every operation writes."""
    batch, inputs = 32, (shape(32, 8, 8, 1), shape(32))
    network = TINY.clone(label_dim=0, augment_dim=0)
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)

    def loss(params, x, c_noise):
        return jnp.sum(network.apply(params, x, c_noise) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(params, *inputs).compile()
    ratio = compiled.memory_analysis().temp_size_in_bytes / activation_bytes(network, (8, 8, 1), batch)
    assert 0.5 < ratio < 2


def test_activations_are_affine_in_the_batch():
    one, two, five = (activation_bytes(TINY, (8, 8, 1), batch) for batch in (1, 2, 5))
    assert five == one + 4 * (two - one)
    assert activation_bytes(TINY.clone(dtype=jnp.bfloat16), (8, 8, 1), 5) < 0.8 * five


DEEPER = SongUNet(16, 1, 0, 0, "ddpmpp", 8, (1, 1), 1, num_blocks=2, attn_resolutions=(), dropout=0.1)


@pytest.mark.slow
def test_rematerialised_blocks_take_less_memory_and_more_operations():
    shape = (16, 16, 1)
    kept = [activation_bytes(DEEPER.clone(remat=remat), shape, 4) for remat in ((), (8,), (16,), (16, 8))]
    assert kept[0] > kept[1] > kept[2] > kept[3] > 0.1 * kept[0]
    fine, coarse, both = (recomputed_flops(DEEPER.clone(remat=remat), shape) for remat in ((16,), (8,), (16, 8)))
    assert recomputed_flops(DEEPER, shape) == 0 < coarse < fine and both == fine + coarse
    forward = forward_flops(DEEPER.clone(remat=(16, 8)), shape)
    assert forward == forward_flops(DEEPER, shape) and 0.8 * forward < both < forward  # all but the ends are blocks
    assert dataclasses.replace(PLAN, recomputed_flops=10).step_flops == PLAN.step_flops + 64 * 10


def test_blocks_are_counted():
    for network in (DEEPER, TINY, DEEPER.clone(resolution=32, channel_mult=(1, 1, 1))):
        inputs = shape(1, network.resolution, network.resolution, 1), shape(1)
        blocks = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
        for level in range(len(network.channel_mult)):
            res = network.resolution >> level
            named = [name for name in blocks if f"_{res}x{res}_" in name and "conv0" in blocks[name]]
            assert accounting._blocks_at(network, res) == len(named)


def test_what_cannot_be_traced_here_can_be_counted():
    cudnn = TINY.clone(attention="cudnn", dtype=jnp.bfloat16)
    assert forward_flops(cudnn, (8, 8, 1)) == forward_flops(TINY, (8, 8, 1))
    assert activation_bytes(cudnn, (8, 8, 1), 2) == activation_bytes(cudnn.clone(attention="xla"), (8, 8, 1), 2)


PLAN = Plan(
    title="a run", dtype="bfloat16", parameters=10**9, forward_flops=10**10, activation_bytes_fixed=0,
    activation_bytes_per_image=2**30, images=1_000_001, batch_size=64, accumulation=1, nfe=35,
    accelerator=Accelerator("a device", 100, 50, 32), num_devices=2, utilisation=0.5,
)  # fmt: skip


def test_plan():
    assert PLAN.steps == 15_626  # 64 x 15,625 = 1,000,000 images, and one more
    assert PLAN.images_at_once == 32 and PLAN.activation_bytes == 32 * 2**30
    assert PLAN.step_flops == 64 * 3 * 10**10
    assert PLAN.seconds(PLAN.step_flops) == pytest.approx(64 * 3e10 / 100e12)  # half of two devices' peak
    assert dataclasses.replace(PLAN, dtype="float32").seconds(10**12) == pytest.approx(1 / 50)
    assert PLAN.memory_share == pytest.approx((5 * 4e9 / 2**30 + 32) / 32)
    # 24 * 10^9 bytes of state with a sum of gradients leave 9.6 GiB: 8 images.
    assert PLAN.fitting_accumulation() == 4
    assert dataclasses.replace(PLAN, parameters=2 * 10**9).fitting_accumulation() is None


def test_accelerators_are_sane():
    for accelerator in ACCELERATORS.values():
        assert 0 < accelerator.float32_tflops <= accelerator.bfloat16_tflops < 5000
        assert 8 <= accelerator.memory_gib <= 300
    assert ACCELERATORS["h100"].peak_tflops("bfloat16") == 989 and ACCELERATORS["h100"].peak_tflops(jnp.float32) == 494
