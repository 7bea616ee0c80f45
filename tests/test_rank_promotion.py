"""The core within programs that have JAX refuse to add axes by itself (``jax_numpy_rank_promotion``); nothing is compiled.

(Its refusal of other implicit conversions, ``jax_numpy_dtype_promotion``, JAX's own attention does not bear.)
"""

import argparse

import jax
import jax.numpy as jnp
import pytest
import tiny

from fdm_jax.cli.config import load
from fdm_jax.experiment import Experiment
from fdm_jax.sampling import Churn
from fdm_jax.sampling.editing import colorise, inpaint
from fdm_jax.sampling.solvers import SOLVERS
from fdm_jax.training.step import init_state, make_train_step


@pytest.fixture(autouse=True)
def no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


def made(config, *overrides):
    fields = ["network.model_channels=8", "network.num_blocks=1", "data.resolution=16", "data.channels=3", *overrides]
    overrides = [f"--config.{field}" for field in ("data.num_classes=10", "network.channel_mult=(1,2)", *fields)]
    return Experiment.from_config(load(argparse.Namespace(config=f"{tiny.ROOT}/configs/{config}", overrides=overrides)))


def shapes(experiment):
    return jax.eval_shape(lambda: init_state(experiment.network, experiment.spec, experiment.image_shape))


@pytest.mark.parametrize(
    "config, dtype", [("edm.py:cifar10", "bfloat16"), ("vp.py:cifar10", "float32"), ("ve.py:cifar10", "float32")]
)
def test_step(config, dtype):
    experiment = made(config, f"network.dtype={dtype}", "train.batch_size=4", "train.accumulation=2")
    state = shapes(experiment)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((4,), jnp.int32),
        "index": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    after, _ = jax.eval_shape(make_train_step(experiment.network, experiment.family, experiment.spec), state, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.fixture(scope="module")
def model():
    experiment = made("edm.py:cifar10", "network.channel_mult=(1,)", "network.attn_resolutions=()")
    state = shapes(experiment)
    return experiment, {"params": state.params, **state.constants}


@pytest.mark.parametrize(
    "solver, churn", [*((name, None) for name in SOLVERS), ("heun", Churn(S_churn=10)), ("euler", Churn(S_churn=10))]
)
def test_sampler(model, solver, churn):
    experiment, variables = model
    generate = experiment.generate_fn(solver=solver, steps=6, churn=churn)
    seeds, labels = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct((2,), jnp.int32)
    images, *_ = jax.tree.leaves(jax.eval_shape(generate, variables, seeds, labels))
    assert images.shape == (2, 16, 16, 3)


def test_editing():
    x = jnp.zeros((2, 4, 4, 3))
    for denoise_fn in (inpaint(lambda x, sigma: x, x, jnp.ones((4, 4, 1))), colorise(lambda x, sigma: x, x[..., :1])):
        assert jax.eval_shape(denoise_fn, x, jnp.ones(())).shape == x.shape
