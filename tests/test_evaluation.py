"""Measures of a model against golden numbers, closed forms and the real digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from fdm_jax.denoiser import make_denoise_fn
from fdm_jax.evaluation.denoising import DenoisingError, held_out_error
from fdm_jax.evaluation.digits import DigitJudge
from fdm_jax.evaluation.frechet import frechet_distance
from fdm_jax.evaluation.moments import moments
from fdm_jax.families import EDM, VE, VP
from fdm_jax.momentum import Momentum

D_DATA = 0.5


def ideal(x, sigma, labels):
    """The best denoiser of y ~ N(0, 0.5^2)."""
    return D_DATA**2 / (D_DATA**2 + sigma[:, None, None, None] ** 2) * x


def gaussian_images(n, shape=(8, 8, 1)):
    return np.random.default_rng(5).normal(scale=D_DATA, size=(n, *shape)).astype(np.float32)


# Frechet distance


@pytest.mark.parametrize(("case", "tolerance"), [("well", 1e-8), ("deficient", 1e-5)])
def test_golden_frechet_distance(golden, case, tolerance):
    data = golden("fid")
    got = frechet_distance(*(data[f"{case}/{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")))
    assert got == pytest.approx(float(data[f"{case}/fid"]), rel=tolerance)
    assert got == pytest.approx(float(data[f"{case}/fid_eig"]), rel=min(tolerance, 1e-7))


def test_golden_frechet_distance_of_a_set_from_itself(golden):
    data = golden("fid")
    got = frechet_distance(*(data[f"same/{name}"] for name in ("mu1", "sigma1", "mu2", "sigma2")))
    assert got == pytest.approx(float(data["same/fid"]), abs=1e-10)


def test_frechet_distance_of_covariances_that_commute():
    """There it is |mu1 - mu2|^2 + sum (sqrt a_i - sqrt b_i)^2, zeros among the eigenvalues included."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    a, b = np.array([4, 1, 0.25, 0, 0, 9.0]), np.array([1, 1, 4, 0, 2.25, 0.0])
    mu = rng.normal(size=6)
    got = frechet_distance(mu, Q * a @ Q.T, np.zeros(6), Q * b @ Q.T)
    assert got == pytest.approx(mu @ mu + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-6)


def test_moments_are_those_of_numpy_and_of_the_original(golden):
    data = golden("fid")
    for i in "12":
        features = data[f"deficient/features{i}"]
        before = features.copy()
        mean, covariance = moments(features)
        assert mean.dtype == covariance.dtype == np.float64
        np.testing.assert_allclose(mean, data[f"deficient/mu{i}"], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(covariance, data[f"deficient/sigma{i}"], rtol=1e-10, atol=1e-13)
        by_numpy = np.cov(features.astype(np.float64), rowvar=False)
        np.testing.assert_allclose(covariance, by_numpy, rtol=1e-10, atol=1e-13)
        np.testing.assert_array_equal(features, before)


def test_moments_keep_their_digits_far_from_zero():
    features = np.random.default_rng(0).normal(size=(100, 3))
    np.testing.assert_allclose(moments(features + 1e6)[1], moments(features)[1], rtol=1e-8, atol=1e-8)


# Denoising error


def score(denoise_fn, images, **settings):
    return held_out_error(denoise_fn, images, np.zeros(len(images), np.int32), **settings)


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5, 2.0, 20.0])
def test_ideal_denoiser_scores_one_at_every_noise_level(sigma):
    """lambda c_out^2 = 1, and c_out^2 is the variance of y given x: exact but for 4 x 256 x 64 squared normals."""
    got = score(ideal, gaussian_images(256), P_mean=np.log(sigma), P_std=0.0)
    assert got == pytest.approx(1, abs=5 * np.sqrt(2 / (256 * 64)))  # as if the four levels of an image shared their y


def test_ideal_denoiser_scores_one_over_all_levels():
    assert score(ideal, gaussian_images(256)) == pytest.approx(1, abs=5 * np.sqrt(2 / (256 * 64)))
    other = 2 * gaussian_images(256)  # of standard deviation 1
    best = lambda x, sigma, labels: x / (1 + sigma[:, None, None, None] ** 2)  # noqa: E731
    assert score(best, other, sigma_data=1.0) == pytest.approx(1, abs=5 * np.sqrt(2 / (256 * 64)))


@pytest.mark.parametrize(
    ("denoise", "variance"),
    [(lambda x, sigma, labels: 0 * x, D_DATA**2), (lambda x, sigma, labels: x, 0.3**2)],
    ids=["nothing", "everything"],
)
def test_trivial_denoisers_score_their_closed_form(denoise, variance):
    """D = 0 is wrong by y, D = x by sigma n."""
    expected = variance * (0.3**2 + D_DATA**2) / (0.3 * D_DATA) ** 2
    assert score(denoise, gaussian_images(256), P_mean=np.log(0.3), P_std=0.0) == pytest.approx(expected, rel=0.03)


def draws(images, **settings):
    """(sigma [N], noise [N, pixels]) that images of zeros are shown with."""
    seen = []

    def denoise(x, sigma, labels):
        seen.append((np.asarray(sigma), np.asarray(x / sigma[:, None, None, None]).reshape(len(x), -1)))
        return x

    with jax.disable_jit():
        score(denoise, np.zeros_like(images), **settings)
    return (np.concatenate(column) for column in zip(*seen, strict=True))


def test_noise_levels_are_stratified_quantiles():
    sigma, _ = draws(np.zeros((400, 1, 1, 1), np.float32), batch_size=1600)
    u = norm.cdf((np.log(sigma) + 1.2) / 1.2).reshape(400, 4)
    np.testing.assert_array_equal(np.floor(4 * u), np.tile(np.arange(4), (400, 1)))
    within = 4 * u - np.arange(4)  # each uniform: mean 1/2, variance 1/12
    np.testing.assert_allclose(within.mean(axis=0), 0.5, atol=5 * np.sqrt(1 / 12 / 400))
    np.testing.assert_allclose(within.var(axis=0), 1 / 12, atol=0.015)


def test_noise_is_standard_normal_and_new_for_each_row():
    _, noise = draws(np.zeros((16, 8, 8, 3), np.float32), batch_size=16)
    assert noise.shape == (64, 192)
    assert abs(noise.mean()) < 0.04 and noise.std() == pytest.approx(1, abs=0.03)
    assert abs(np.corrcoef(noise) - np.eye(64)).max() < 0.4  # 192 numbers each: 0.07 by chance


def test_error_is_a_function_of_the_seed_and_not_of_the_batch():
    images = gaussian_images(37)
    reference = score(ideal, images)
    assert score(ideal, images) == reference
    for batch_size in (16, 148, 1000):
        assert score(ideal, images, batch_size=batch_size) == pytest.approx(reference, rel=1e-6)
    assert score(ideal, images, seed=1) != reference


def test_labels_reach_their_images():
    """Constant images that say their class, and a denoiser that knows it from the label alone: no error."""
    classes = np.arange(21) % 5
    images = np.broadcast_to((classes / 5).astype(np.float32)[:, None, None, None], (21, 2, 2, 1))

    def reader(x, sigma, labels):
        return jnp.broadcast_to((labels / 5)[:, None, None, None], x.shape)

    assert held_out_error(reader, images, classes, batch_size=8) == pytest.approx(0, abs=1e-9)
    assert held_out_error(reader, images, (classes + 1) % 5, batch_size=8) > 0.1


def test_all_batches_share_one_compilation():
    traces = []

    def denoise(x, sigma, labels):
        traces.append(x.shape)
        return ideal(x, sigma, labels)

    score(denoise, gaussian_images(10), batch_size=16)
    assert traces == [(16, 8, 8, 1)]


@pytest.mark.parametrize("family", [VP(), VE(), EDM(), EDM(momentum=Momentum())], ids=["vp", "ve", "edm", "edm_fdm"])
def test_families_are_measured_by_one_yardstick(family):
    """One and the same D in the form of each family, F = (D - c_skip x) / c_out, gets one and the same figure."""

    def denoise(x, sigma, labels):
        c_skip, c_out, *_ = (coefficient[:, None, None, None] for coefficient in family.coefficients(sigma))
        F_x = (ideal(x, sigma, labels) - c_skip * x) / c_out
        return make_denoise_fn(family, lambda scaled, c_noise: F_x)(x, sigma)

    images = gaussian_images(64)
    assert score(denoise, images) == pytest.approx(score(ideal, images), rel=1e-3)


# The judge of digits


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return DigitJudge(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def digits(judge):
    """All real digits, in scikit-learn's order, made without the code under test."""
    import sklearn.datasets

    data = sklearn.datasets.load_digits()
    return np.rint(data.images[..., None] * (255 / 16)).astype(np.uint8), data.target


def test_judge_reads_held_out_digits(judge):
    assert round(judge.held_out_accuracy, 3) == 0.993


def test_judge_finds_no_sense_in_shuffled_labels(judge, digits):
    images, labels = digits
    assert judge.accuracy(images, labels) > 0.99
    assert judge.accuracy(images, np.random.default_rng(0).permutation(labels)) == pytest.approx(0.1, abs=0.03)


def test_distance_of_real_digits(judge, digits):
    """0.033 for 1,000 drawn with replacement, as the original's table says; 0 for all of them; more for others."""
    images, _ = digits
    assert judge.frechet(images) == pytest.approx(0, abs=1e-6)
    rng = np.random.default_rng(0)
    draws = [judge.frechet(images[rng.integers(len(images), size=1000)]) for _ in range(5)]
    assert np.mean(draws) == pytest.approx(0.033, abs=0.003)
    assert judge.frechet(255 - images) > 5


def test_errors_by_noise_level_are_those_of_the_levels():
    """Of D = 0 and of the ideal denoiser, in closed form; the same noise at every level and call."""
    sigmas = [0.05, 0.5, 5.0]
    error = DenoisingError(lambda v, x, sigma, labels: v * ideal(x, sigma, labels), gaussian_images(200), np.zeros(200))
    np.testing.assert_allclose(error.by_sigma(1.0, sigmas), 1, atol=5 * np.sqrt(2 / (200 * 64)))
    expected = [D_DATA**2 * (s**2 + D_DATA**2) / (s * D_DATA) ** 2 for s in sigmas]
    nothing = error.by_sigma(0.0, sigmas)
    np.testing.assert_allclose(nothing, expected, rtol=0.05)
    np.testing.assert_allclose(nothing / expected, nothing[0] / expected[0], rtol=1e-5)
    np.testing.assert_array_equal(error.by_sigma(0.0, sigmas[1:]), nothing[1:])
    assert error.mean(1.0) == pytest.approx(held_out_error(ideal, gaussian_images(200), np.zeros(200)), rel=1e-6)
