"""The adaptive ODE solver and likelihoods, on densities whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from conftest import enable_x64
from test_solvers import HIGH, LOW, START, end_of_two_peaks, gaussian, two_peaks

from fdm_jax.errors import UserError
from fdm_jax.sampling import edm_sample, edm_sigmas
from fdm_jax.sampling.editing import encode, start_from
from fdm_jax.sampling.flow import (
    bits_per_dim,
    exact_trace,
    hutchinson,
    log_likelihood,
    reference_samples,
    solve_flow,
)  # fmt: skip
from fdm_jax.sampling.linear import integrate
from fdm_jax.sampling.solvers import make_calls

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_draws_whatever_ran_before():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


def correlated():
    """Mean, covariance and ideal denoiser of a Gaussian over 4x4x1 images."""
    root = RNG.standard_normal((16, 16)) / 8
    mean, covariance = RNG.uniform(-0.5, 0.5, 16), root @ root.T + 0.05 * np.eye(16)

    def denoise(x, sigma):
        flat = x.reshape(len(x), 16)
        gain = jnp.linalg.solve(covariance + sigma**2 * jnp.eye(16), covariance)
        return (mean + (flat - mean) @ gain).reshape(x.shape)

    return mean, covariance, denoise


def test_the_end_is_the_odes():
    with enable_x64():
        solved = jax.jit(lambda x: solve_flow(two_peaks, x * HIGH, HIGH, LOW, rtol=1e-9, atol=1e-9))(
            jnp.asarray(START.reshape(1, 2, 2, 1))
        )
        assert solved.ok
        np.testing.assert_allclose(solved.x.ravel(), end_of_two_peaks(), atol=1e-7)


def test_single_precision_reaches_its_tolerance_whatever_the_company():
    latents = jnp.asarray(RNG.standard_normal((8, 4, 4, 1)), jnp.float32)
    solve = jax.jit(lambda x: reference_samples(two_peaks, x, SIGMA_MAX, SIGMA_MIN))
    together, alone = solve(latents), solve(latents[:1])
    assert together.ok and 5 < together.steps < 300
    np.testing.assert_allclose(together.x[:1], alone.x, atol=3e-4)
    sampled = integrate(two_peaks, latents, SIGMA_MAX, make_calls("heun", 300, edm_sigmas))
    np.testing.assert_allclose(together.x, sampled, atol=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("below", [100.0, 1.0])
def test_a_denoiser_that_is_not_finite_is_soon_given_up(bad, below):
    """At all noise levels, or below one: not only after the 4,096 steps that may be taken."""
    latents = jnp.ones((1, 4, 4, 1))
    broken = jax.jit(
        lambda x: solve_flow(lambda y, sigma: jnp.where(sigma < below, bad, gaussian(y, sigma)), x * HIGH, HIGH, LOW)
    )(latents)
    assert not broken.ok and broken.steps < 100


def test_back_and_forth():
    _, _, denoise = correlated()
    x = jnp.asarray(RNG.standard_normal((2, 4, 4, 1)), jnp.float32) / 2
    there = solve_flow(denoise, x, SIGMA_MIN, SIGMA_MAX)
    back = solve_flow(denoise, there.x, SIGMA_MAX, SIGMA_MIN)
    np.testing.assert_allclose(back.x, x, atol=2e-3)


def test_the_likelihood_of_a_gaussian_is_its_own():
    """To 1e-3 nats: the density at sigma_min, the trace exact, and so much noise that the mean is lost in it."""
    mean, covariance, denoise = correlated()
    x = RNG.multivariate_normal(mean, covariance, 5)
    exact = scipy.stats.multivariate_normal(mean, covariance + SIGMA_MIN**2 * np.eye(16)).logpdf(x)
    with enable_x64():
        images = jnp.asarray(x.reshape(5, 4, 4, 1))
        solved = jax.jit(
            lambda x: log_likelihood(denoise, x, SIGMA_MIN, 1e5, exact_trace, rtol=1e-7, atol=1e-7)
        )(images)  # fmt: skip
    assert solved.ok
    np.testing.assert_allclose(solved.x, exact, atol=1e-3)


def test_the_likelihood_in_the_usual_precision_and_range():
    """What a user gets: float32, tolerance 1e-5, noise up to 80."""
    x = RNG.standard_normal((5, 16)) / 2
    exact = scipy.stats.norm(0, np.hypot(0.5, SIGMA_MIN)).logpdf(x).sum(axis=1)
    images = jnp.asarray(x.reshape(5, 4, 4, 1), jnp.float32)
    solved = jax.jit(lambda x: log_likelihood(gaussian, x, SIGMA_MIN, SIGMA_MAX, exact_trace))(images)
    np.testing.assert_allclose(solved.x, exact, atol=1e-3)


def test_hutchinsons_estimate_is_right_on_average():
    mean, covariance, denoise = correlated()
    x = jnp.asarray(np.broadcast_to(RNG.multivariate_normal(mean, covariance), (400, 16)).reshape(400, 4, 4, 1))
    probes = jnp.asarray(RNG.choice([-1.0, 1.0], (400, 4, 4, 1)), jnp.float32)
    x = x.astype(jnp.float32)
    exact = log_likelihood(denoise, x[:1], SIGMA_MIN, SIGMA_MAX, exact_trace).x
    estimates = np.asarray(jax.jit(
        lambda x, e: log_likelihood(denoise, x, SIGMA_MIN, SIGMA_MAX, hutchinson(e)).x
    )(x, probes))  # fmt: skip
    assert estimates.std() > 0.01  # estimates they are
    assert abs(estimates.mean() - exact[0]) < 3 * estimates.std() / 20 + 5e-3


def test_a_probe_of_another_precision_than_the_images():
    with enable_x64():
        D, trace = hutchinson(jnp.ones((1, 4), jnp.float32))(lambda x: 3 * x, jnp.ones((1, 4), jnp.float64))
        assert D.dtype == jnp.float64 and float(trace[0]) == 12


@pytest.mark.filterwarnings("error")  # JAX warns of every float64 that it is asked for and does not have
def test_numpys_numbers_are_taken():
    x, sigmas = RNG.standard_normal((2, 2, 2, 1)), edm_sigmas(3)
    assert edm_sample(gaussian, x, sigmas).dtype == encode(gaussian, x, sigmas).dtype == jnp.float32
    np.testing.assert_array_equal(
        edm_sample(gaussian, np.ones((1, 1, 1, 1), int), sigmas), edm_sample(gaussian, np.ones((1, 1, 1, 1)), sigmas)
    )
    latents, rest = start_from(x, x, sigmas, 0.5)
    assert edm_sample(gaussian, latents, rest).dtype == jnp.float32
    assert reference_samples(gaussian, x, HIGH, LOW).x.dtype == jnp.float32
    assert log_likelihood(gaussian, x, LOW, HIGH, exact_trace).x.dtype == jnp.float32


def test_bits_per_dimension_of_a_uniform_density_are_eight():
    """On 256 bins of 1/127.5, that is of [-1 - 1/255, 1 + 1/255]."""
    log_p = -12 * np.log(256 / 127.5)
    assert bits_per_dim(jnp.asarray(log_p), 12) == pytest.approx(8, abs=1e-5)


@pytest.mark.parametrize("levels", [(0.0, 1.0), (1.0, 1.0), (2.0, float("inf")), (-1.0, 2.0)])
def test_bad_levels(levels):
    with pytest.raises(UserError, match="one positive noise level to another"):
        solve_flow(two_peaks, jnp.ones((1, 2, 2, 1)), *levels)


def test_a_likelihood_goes_from_low_noise_to_high():
    with pytest.raises(UserError, match="0 < sigma_min < sigma_max, and is 80.0 to 0.002"):
        log_likelihood(gaussian, jnp.ones((1, 2, 2, 1)), SIGMA_MAX, SIGMA_MIN, exact_trace)
