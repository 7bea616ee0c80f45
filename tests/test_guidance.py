"""Guidance against its formula on denoisers that are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdm_jax.errors import UserError
from fdm_jax.families import EDM
from fdm_jax.networks import SongUNet
from fdm_jax.sampling import edm_sigmas
from fdm_jax.sampling.generate import make_model_denoiser
from fdm_jax.sampling.guidance import Guidance, with_and_without_class
from fdm_jax.sampling.linear import integrate
from fdm_jax.sampling.solvers import make_calls

LABELS = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
CENTRES = np.array([-1.0, 0.5, 0.0])  # of class 0, of class 1, without a class


def denoise(x, sigma, labels):
    """N(centre of the class, 0.3^2) in every pixel."""
    centre = (labels @ jnp.asarray(CENTRES[:2]))[:, None, None, None]
    return (0.09 * x + sigma**2 * centre) / (0.09 + sigma**2)


def guided(guidance):
    return guidance(lambda x, sigma: denoise(x, sigma, LABELS), with_and_without_class(denoise, LABELS))


X = jnp.asarray(np.random.RandomState(0).standard_normal((3, 2, 2, 1)), jnp.float32)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, -1.0])
def test_formula(scale):
    sigma = jnp.float32(0.7)
    alone, other = denoise(X, sigma, LABELS), denoise(X, sigma, 0 * LABELS)
    np.testing.assert_allclose(
        guided(Guidance(scale=scale))(X, sigma), np.asarray(other) * (1 - scale) + scale * np.asarray(alone), atol=1e-6
    )


def test_range():
    inside, below, above = {"lowest": 0.5, "highest": 2.0}, {"highest": 2.0}, {"lowest": 0.5}
    everywhere = guided(Guidance(scale=3.0))
    for sigma, acting in (
        (0.4, [below]), (0.5, [below]), (0.6, [inside, below, above]), (2.0, [inside, below, above]), (2.1, [above])
    ):  # fmt: skip
        for where in (inside, below, above):
            value = jax.jit(guided(Guidance(scale=3.0, **where)))(X, jnp.float32(sigma))
            expected = everywhere(X, jnp.float32(sigma)) if where in acting else denoise(X, sigma, LABELS)
            np.testing.assert_allclose(value, expected, atol=1e-6)


@pytest.mark.parametrize("solver", ["heun", "dpmpp-3m", "unipc-2"])
def test_samples_move_to_the_guided_centre(solver):
    """Of Gaussians of one width the guided denoiser is that of a Gaussian around scale * centre."""
    calls = make_calls(solver, 40, edm_sigmas)
    latents = jnp.zeros_like(X)
    for scale in (1.0, 2.0):
        out = jax.jit(lambda x, scale=scale: integrate(guided(Guidance(scale=scale)), x, 80.0, calls))(latents)
        # From 0 at sigma = 80 the exact path ends at centre (1 - 0.3 / sqrt(0.09 + 6400)).
        expected = scale * CENTRES * (1 - 0.3 / (0.09 + 6400) ** 0.5)
        np.testing.assert_allclose(out[:, 0, 0, 0], expected, atol=2e-2)


def test_one_pass_serves_both():
    batches = []

    def counted(x, sigma, labels):
        batches.append(len(x))
        return denoise(x, sigma, labels)

    Guidance(scale=2.0)(lambda x, sigma: None, with_and_without_class(counted, LABELS))(X, jnp.float32(1.0))
    assert batches == [6]


def test_bad_input():
    with pytest.raises(UserError, match="finite number, and is nan"):
        Guidance(scale=float("nan"))
    for low, high in ((2.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(UserError, match="from a lower to a higher noise level"):
            Guidance(lowest=low, highest=high)


@pytest.mark.parametrize("kind", ["plain", "classes", "guide"])
def test_exact_denoisers_compute_in_all_digits(kind):
    """As XLA is told: float32 throughout, and no multiplication left to a device's idea of precision."""
    network = SongUNet(8, 1, label_dim=3, model_channels=4, channel_mult=(1,), num_blocks=1, dtype=jnp.bfloat16)
    variables = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))
    guidance = None if kind == "plain" else Guidance(scale=2.0)
    guide = (network, EDM()) if kind == "guide" else None
    if guide:
        variables = (variables, variables)

    def program(**options):
        denoiser = make_model_denoiser(network, EDM(), 3, guidance, guide, **options)
        return str(jax.make_jaxpr(lambda v, x: denoiser(v, jnp.arange(2))(x, 1.0))(variables, jnp.zeros((2, 8, 8, 1))))

    usual, exact = program(), program(exact=True)
    assert "bf16" in usual and "bf16" not in exact
    multiplications = exact.count("conv_general_dilated[") + exact.count("dot_general[")
    assert exact.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == multiplications > 10
