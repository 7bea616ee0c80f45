"""What only a GPU or TPU can show; `make test-device` runs it there, with the golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cli.conftest import assert_same_end

from fdm_jax.cli import bench
from fdm_jax.cli.main import main
from fdm_jax.devices import make_mesh
from fdm_jax.families import EDM
from fdm_jax.momentum import Momentum
from fdm_jax.networks import SongUNet
from fdm_jax.networks.blocks import attend
from fdm_jax.training.parallel import parallelise
from fdm_jax.training.step import TrainSpec, init_state, make_train_step

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator: make test-device"),
]
nvidia = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
NETWORK = SongUNet(32, 3, 10, 0, "ddpmpp", 64, (1, 2), num_blocks=1, dropout=0.1, dtype=jnp.bfloat16)


def compiled_step(network, batch_size=64):
    """The train step's program for all devices, with what it takes."""
    spec = TrainSpec(batch_size=batch_size, learning_rate=1e-3, lr_rampup_images=0, num_classes=10)
    family = EDM(momentum=Momentum(multiplier=2.0))
    parallel = parallelise("jit", lambda axis: make_train_step(network, family, spec, axis=axis), make_mesh())
    state = parallel.put_state(jax.jit(lambda: init_state(network, spec, (32, 32, 3)))())
    rng = np.random.default_rng(0)
    batch = parallel.put_batch({
        "image": rng.integers(0, 256, (batch_size, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, batch_size, np.int32),
        "index": np.arange(batch_size, dtype=np.int32),
    })  # fmt: skip
    return parallel.step.lower(state, batch).compile(), state, batch


def test_a_network_learns_in_bfloat16_as_in_float32():
    """The same draws: losses of ten steps within a percent of each other, and falling."""
    losses = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        step, state, batch = compiled_step(NETWORK.clone(dtype=dtype))
        losses[dtype] = []
        for _ in range(10):
            state, metrics = step(state, batch)
            losses[dtype].append(float(metrics["loss"]))
            assert int(metrics["bad_gradients"]) == 0
    np.testing.assert_allclose(losses[jnp.bfloat16], losses[jnp.float32], rtol=0.01)


def test_rematerialisation_takes_less_memory():
    plain, again = (compiled_step(NETWORK.clone(remat=remat))[0].memory_analysis() for remat in ((), (32, 16)))
    assert again.temp_size_in_bytes < 0.7 * plain.temp_size_in_bytes


@nvidia
@pytest.mark.parametrize("channels", [64, 256])
def test_cudnn_attention_is_that_of_xla(channels):
    """Values and gradients, to the rounding of bfloat16."""
    q, k, v, out = (
        jax.random.normal(key, (4, 256, 1, channels)).astype(jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0), 4)
    )

    def both(implementation):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, implementation), q, k, v)
        return [y, *pull(out)]

    for a, b in zip(jax.jit(both, static_argnums=0)("cudnn"), jax.jit(both, static_argnums=0)("xla"), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


def test_the_largest_product_is_near_what_the_device_can_do():
    """bfloat16 is many times as fast as float32 with all its digits, or the bench measures something else."""
    assert bench.matmul_tflops(jnp.bfloat16) > 3 * bench.matmul_tflops(jnp.float32)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    """With the operations whose sums have no fixed order left out, as `make test-device` has it."""
    data = f"--config.data.data_dir={tmp_path / 'data'}"
    assert main(tiny.arguments(tmp_path / "straight", data)) == 0
    for images in (48, 192, 320):
        assert main(tiny.arguments(tmp_path / "resumed", data, f"--config.train.images={images}")) == 0
    assert_same_end(tmp_path / "resumed", tmp_path / "straight", 20)
