"""Editing on ideal denoisers, whose answers are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from PIL import Image

from fdm_jax.errors import UserError
from fdm_jax.sampling import edm_sigmas
from fdm_jax.sampling.editing import LUMA, colorise, encode, inpaint, interpolate, resampling_calls, start_from
from fdm_jax.sampling.linear import integrate
from fdm_jax.sampling.solvers import SOLVERS, make_calls

RNG = np.random.RandomState(0)


def striped(x, sigma):
    """Images of one grey each, N(0, 0.5^2): the ideal denoiser sees the mean of the pixels alone."""
    n = x[0].size
    mean = x.mean(axis=(1, 2, 3), keepdims=True)
    return jnp.broadcast_to(mean * 0.25 / (0.25 + sigma**2 / n), x.shape)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inpainting_keeps_what_is_known_and_makes_the_rest_like_it(solver):
    known = jnp.full((2, 4, 4, 1), 0.6).at[1].set(-0.3)
    mask = jnp.zeros((4, 4, 1)).at[:2, :2].set(1.0)
    calls = make_calls(solver, 24, edm_sigmas)
    noise = lambda step: jax.random.normal(jax.random.key(step), known.shape)  # noqa: E731
    latents = jnp.asarray(RNG.standard_normal(known.shape), jnp.float32)
    out = np.asarray(jax.jit(lambda x: integrate(inpaint(striped, known, mask), x, 80.0, calls, noise))(latents))
    kept = np.broadcast_to(mask == 0, known.shape)
    np.testing.assert_allclose(out[kept], np.asarray(known)[kept], atol=1e-5)
    np.testing.assert_allclose(out[:, :2, :2].mean(axis=(1, 2, 3)), [0.6, -0.3], atol=0.25)


def test_resampling_agrees_more_with_what_is_known():
    """Two pixels, correlated by 0.9: what is made of one must be distributed as the other tells."""
    covariance = 0.25 * np.array([[1, 0.9], [0.9, 1]])

    def pairs(x, sigma):
        gain = jnp.linalg.solve(covariance + sigma**2 * jnp.eye(2), covariance)
        return (x.reshape(-1, 2) @ gain).reshape(x.shape)

    n = 4000
    known = jnp.full((n, 1, 2, 1), 0.5)
    mask = jnp.asarray([1.0, 0.0]).reshape(1, 2, 1)
    noise = lambda step: jax.random.normal(jax.random.key(step), known.shape)  # noqa: E731
    latents = jnp.asarray(RNG.standard_normal(known.shape), jnp.float32)
    errors = []
    for repeats in (1, 5):
        calls = resampling_calls(edm_sigmas(16), repeats)
        assert len(calls) == 2 * 15 * repeats + 1
        sample = jax.jit(lambda x, calls=calls: integrate(inpaint(pairs, known, mask), x, 80.0, calls, noise))
        made = np.asarray(sample(latents))[:, 0, 0, 0]
        errors.append((abs(made.mean() - 0.9 * 0.5), abs(made.std() - 0.5 * np.sqrt(1 - 0.81))))
    assert errors[1][0] < errors[0][0] / 2 and errors[1][0] < 0.08
    assert errors[1][1] < 0.06


def test_resampling_once_is_the_plain_table():
    assert resampling_calls(edm_sigmas(5), 1, heun=False)[-1].noise == 0
    x = jnp.asarray(RNG.standard_normal((1, 4, 4, 1)), jnp.float32)
    once = integrate(two_peaks, x, 80.0, resampling_calls(edm_sigmas(5), 1))
    np.testing.assert_array_equal(once, integrate(two_peaks, x, 80.0, make_calls("heun", 5, edm_sigmas)))


def test_a_mask_of_nothing_and_of_everything():
    x, known = jnp.ones((1, 4, 4, 1)), jnp.zeros((1, 4, 4, 1))
    np.testing.assert_array_equal(inpaint(striped, known, jnp.zeros((4, 4, 1)))(x, 1.0), known)
    np.testing.assert_array_equal(inpaint(striped, known, jnp.ones((4, 4, 1)))(x, 1.0), striped(x, 1.0))


def test_luma_is_that_of_grey_pictures():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    np.testing.assert_allclose(colours @ np.array(LUMA), np.asarray(Image.fromarray(colours).convert("L")), atol=0.51)


def test_colorisation_has_the_luma_and_moves_by_the_least():
    D = jnp.asarray(RNG.standard_normal((2, 3, 3, 3)), jnp.float32)
    grey = jnp.asarray(RNG.standard_normal((2, 3, 3, 1)), jnp.float32)
    out = colorise(lambda x, sigma: D, grey)(D, 1.0)
    np.testing.assert_allclose(out @ np.array(LUMA), grey[..., 0], atol=1e-5)
    moved = np.asarray(out - D)
    np.testing.assert_allclose(np.cross(moved, LUMA), 0, atol=1e-5)  # along the luma's weights, so the shortest way


def two_peaks(x, sigma):
    centres = jnp.asarray([-1.0, 0.5], x.dtype)
    variance = 0.09 + sigma**2
    p = jax.nn.softmax(-((x[..., None] - centres) ** 2) / (2 * variance))
    return (p * (0.09 * x[..., None] + sigma**2 * centres) / variance).sum(-1)


def test_encoding_and_back():
    sigmas = edm_sigmas(200)
    with enable_x64():
        images = jnp.asarray(RNG.uniform(-1.5, 1, (2, 4, 4, 1)))
        latents = jax.jit(lambda x: encode(two_peaks, x, sigmas))(images)
        back = jax.jit(lambda x: integrate(two_peaks, x, 80.0, make_calls("heun", 200, edm_sigmas)))(latents)
        np.testing.assert_allclose(back, images, atol=1e-3)


def test_encoding_of_a_gaussian_is_its_exact_latent():
    """x(80) = x(0.002) sqrt((0.25 + 80^2) / (0.25 + 0.002^2)), divided by 80."""
    denoise = lambda x, sigma: x * 0.25 / (0.25 + sigma**2)  # noqa: E731
    with enable_x64():
        images = jnp.asarray(RNG.standard_normal((1, 2, 2, 1))) / 2
        latents = encode(denoise, images, edm_sigmas(400))
        exact = images * ((0.25 + 6400) / (0.25 + 0.002**2)) ** 0.5 / 80
        np.testing.assert_allclose(latents, exact, rtol=1e-4)
        few = encode(denoise, images, np.array([0.003, 0.002]))  # one step, so short that it is exact
        np.testing.assert_allclose(few, images * ((0.25 + 0.003**2) / (0.25 + 0.002**2)) ** 0.5 / 0.003, rtol=1e-9)


def test_image_to_image_starts_at_a_level_of_the_grid():
    sigmas = edm_sigmas(20)
    images, noise = jnp.asarray(RNG.uniform(-1, 1, (2, 4, 4, 1))), jnp.asarray(RNG.standard_normal((2, 4, 4, 1)))
    latents, rest = start_from(images, noise, sigmas, 0.5)
    np.testing.assert_array_equal(rest, sigmas[10:])
    np.testing.assert_allclose(latents * rest[0], images + rest[0] * noise, rtol=1e-5)
    assert len(start_from(images, noise, sigmas, 1.0)[1]) == 21 and len(start_from(images, noise, sigmas, 1e-3)[1]) == 2
    distances = []
    for strength in (0.1, 0.5, 0.9):
        latents, rest = start_from(images, noise, sigmas, strength)
        out = integrate(two_peaks, latents, rest[0], make_calls("heun", len(rest) - 1, rest))
        distances.append(float(jnp.abs(out - images).mean()))
    assert distances == sorted(distances) and distances[0] < 0.1 < distances[-1]


def test_interpolation_keeps_the_norm_and_the_ends():
    a, b = (jnp.asarray(RNG.standard_normal((1, 64, 64, 3)), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(interpolate(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(interpolate(a, b, 1.0), b, atol=1e-6)
    assert float(interpolate(a, b, 0.3).std()) == pytest.approx(1, abs=0.02)


def test_bad_input():
    x = jnp.zeros((1, 4, 4, 1))
    with pytest.raises(UserError, match=r"mask is \[3, 3, 1\], which does not fit images of \[1, 4, 4, 1\]"):
        inpaint(striped, x, jnp.ones((3, 3, 1)))
    with pytest.raises(UserError, match=r"mask is \[4, 4\], which"):  # would make images of four channels
        inpaint(striped, x, jnp.ones((4, 4)))
    with pytest.raises(UserError, match="once or more, and not 0 times"):
        resampling_calls(edm_sigmas(5), 0)
    with pytest.raises(UserError, match="1 channel, and these have 3"):
        colorise(striped, jnp.zeros((1, 4, 4, 3)))
    for strength in (0.0, 1.5):
        with pytest.raises(UserError, match="strength must be above 0 and at most 1"):
            start_from(x, x, edm_sigmas(5), strength)
    with pytest.raises(UserError, match="two noise levels or more"):
        encode(striped, x, np.array([1.0, 0.0]))
