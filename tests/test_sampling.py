"""The EDM sampler against the original's outputs, an exact solution, and its order; seeds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64

from fdm_jax.devices import make_mesh
from fdm_jax.errors import UserError
from fdm_jax.families import EDM, VE, VP
from fdm_jax.momentum import Momentum
from fdm_jax.sampling import Churn, edm_sample, edm_sigmas, sampling_range
from fdm_jax.sampling.edm import evaluation_sigmas
from fdm_jax.sampling.generate import BatchedGenerator, NotFinite, levels_of
from fdm_jax.sampling.grids import GRIDS, log_snr_sigmas, vp_time_sigmas
from fdm_jax.sampling.seeds import choose_labels, churn_noise, dequantise, labels, latents, signs, to_uint8


def mixture_denoiser(data, kind):
    """The ideal denoiser of the stored mixture of Gaussians (NCHW arrays, flattened onto its means)."""
    mu, w, s = (jnp.asarray(data[key]) for key in ("mu", "w", f"s_{kind}"))

    def denoise(x, sigma):
        flat = x.reshape(x.shape[0], 1, -1)
        variance = s**2 + sigma**2
        square = jnp.sum((flat - mu) ** 2, -1)
        p = jax.nn.softmax(jnp.log(w) - square / (2 * variance) - mu.shape[1] / 2 * jnp.log(variance))
        each = (s[:, None] ** 2 * flat + sigma**2 * mu) / variance[:, None]
        return jnp.sum(p[..., None] * each, axis=1).reshape(x.shape)

    return denoise


@pytest.mark.parametrize("kind", ["points", "gauss"])
def test_golden_ideal_denoiser(golden, kind):
    """The denoiser that the next tests rest on is the original's."""
    data = golden("samplers")
    with enable_x64():
        for sigma in ("0.002", "0.3", "2", "80"):
            D = mixture_denoiser(data, kind)(jnp.asarray(data["Dcheck/x"]), float(sigma))
            np.testing.assert_allclose(D, data[f"Dcheck/{kind}_{sigma}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["points", "gauss"])
@pytest.mark.parametrize("span", ["inf", "clip"])
@pytest.mark.parametrize("steps", [5, 18, 40])
def test_golden_edm_sampler(golden, kind, span, steps):
    data = golden("samplers")
    prefix = f"edm/{kind}_{span}_steps{steps}"
    family = EDM() if span == "inf" else VE(lowest=0.02, highest=50.0)
    sigmas = edm_sigmas(steps, *sampling_range(family))
    np.testing.assert_allclose(sigmas, data[f"{prefix}/t_steps"], rtol=1e-12)
    np.testing.assert_allclose(evaluation_sigmas(sigmas), data[f"{prefix}/sigmas_called"], rtol=1e-12)
    assert len(evaluation_sigmas(sigmas)) == data[f"{prefix}/nfe"] == 2 * steps - 1
    with enable_x64():
        out = edm_sample(mixture_denoiser(data, kind), jnp.asarray(data["latents"]), sigmas)
        np.testing.assert_allclose(out, data[f"{prefix}/out"], rtol=1e-6, atol=1e-9)
    out = edm_sample(mixture_denoiser(data, kind), jnp.asarray(data["latents"], jnp.float32), sigmas)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, data[f"{prefix}/out"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["points", "gauss"])
def test_golden_churn(golden, kind):
    data = golden("samplers")
    churn = Churn(S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)
    sigmas = edm_sigmas(18)
    np.testing.assert_allclose(evaluation_sigmas(sigmas, churn), data[f"churn/{kind}/sigmas_called"], rtol=1e-12)
    with enable_x64():
        noise = jnp.asarray(data[f"churn/{kind}/noise"])
        out = edm_sample(
            mixture_denoiser(data, kind), jnp.asarray(data["latents"]), sigmas, churn=churn, noise_fn=lambda i: noise[i]
        )
        np.testing.assert_allclose(out, data[f"churn/{kind}/out"], rtol=1e-6, atol=1e-9)


def test_churn_is_shared_by_all_steps_within_an_inclusive_range_and_capped():
    sigmas = np.array([50.0, 20.0, 1.0, 0.05, 0.01])
    few = Churn(S_churn=1.5, S_min=0.05, S_max=20)
    np.testing.assert_allclose(few.gamma(sigmas), [0, 0.3, 0.3, 0.3, 0], rtol=1e-15)
    np.testing.assert_allclose(Churn(S_churn=40).gamma(sigmas), 2**0.5 - 1, rtol=1e-15)


def gaussian_end(sigmas, heun):
    """From x = 80 at sigma = 80 under the ideal denoiser of N(0, 0.5^2)."""
    with enable_x64():
        out = edm_sample(
            lambda x, sigma: x * 0.25 / (0.25 + sigma**2), jnp.ones((1, 1, 1, 1), jnp.float64), sigmas, heun=heun
        )
    return float(out[0, 0, 0, 0])


# Reference values of the two methods; the exact end point is 80 * 0.5 / sqrt(0.25 + 6400) = 0.499990234661.
HEUN = {18: 0.527624637, 36: 0.506097092, 72: 0.501425626, 144: 0.500335723}
EULER = {18: 0.423031436, 36: 0.460996216, 72: 0.480369490, 144: 0.490148229}


@pytest.mark.device
@pytest.mark.parametrize("heun,expected", [(True, HEUN), (False, EULER)], ids=["heun", "euler"])
def test_analytic_gaussian(heun, expected):
    for steps, value in expected.items():
        assert gaussian_end(edm_sigmas(steps), heun) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("heun,order", [(True, 2), (False, 1)], ids=["heun", "euler"])
def test_order_of_convergence(heun, order):
    # Stop at sigma = 0.002: the last step to 0 is one of Euler's whatever the solver, a floor under the error.
    exact = 80 * (0.25 + 0.002**2) ** 0.5 / (0.25 + 80**2) ** 0.5
    error = {steps: abs(gaussian_end(edm_sigmas(steps)[:-1], heun) - exact) for steps in (144, 288, 576)}
    for steps in (144, 288):
        assert np.log2(error[steps] / error[2 * steps]) == pytest.approx(order, abs=0.15)


def test_one_step_goes_straight_to_the_denoised_image():
    x = jnp.ones((1, 1, 1, 1))
    np.testing.assert_allclose(edm_sample(lambda x, sigma: 0 * x + 0.3, x, edm_sigmas(1)), 0.3, atol=1e-5)


def test_the_network_is_traced_once():
    calls = []

    def denoise(x, sigma):
        calls.append(sigma)
        return 0.5 * x

    jax.jit(lambda x: edm_sample(denoise, x, edm_sigmas(18)))(jnp.ones((1, 2, 2, 1)))
    assert len(calls) <= 2  # lax.scan may trace its body twice; a Python loop would call 35 times


def test_range_is_the_familys_own():
    assert sampling_range(EDM()) == (0.002, 80.0)
    assert sampling_range(EDM(momentum=Momentum())) == (0.002, 80.0)
    assert sampling_range(VE()) == (0.02, 80.0)
    assert sampling_range(VP()) == (0.002, 80.0)


@pytest.mark.parametrize("grid", ["edm", "log-snr"])
def test_the_range_bounds_a_named_grid_unless_told_otherwise(grid):
    """80 ... 0.02 for VE, and 80 ... 0.002 where the original does not look at the family."""
    ends = {clip: levels_of(grid, VE(), 0.002, 80.0, 7.0, clip=clip)(9)[[0, -2, -1]] for clip in (True, False)}
    np.testing.assert_allclose(ends[True], [80, 0.02, 0], rtol=1e-12)
    np.testing.assert_allclose(ends[False], [80, 0.002, 0], rtol=1e-12)
    np.testing.assert_array_equal(levels_of([5.0, 0.001, 0.0], VE(), 0.002, 80.0, 7.0)(9), [5, 0.001, 0])


@pytest.mark.parametrize("grid", GRIDS)
def test_bad_steps_and_ranges(grid):
    assert len(GRIDS[grid](100_000, 0.002, 80.0)) == 100_001
    for bad in (0, -3, 100_001, 10**30):
        with pytest.raises(UserError, match=f"sampling steps must be from 1 to 100,000, and is {bad}"):
            GRIDS[grid](bad, 0.002, 80.0)
    for low, high in ((2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (-1.0, 1.0), (1.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(UserError, match=f"0 < sigma_min < sigma_max, and is {low} to {high}"):
            GRIDS[grid](5, low, high)


@pytest.mark.parametrize("grid", [edm_sigmas, log_snr_sigmas, vp_time_sigmas])
def test_grids_go_from_80_to_0_unless_told_otherwise(grid):
    np.testing.assert_allclose(grid(3)[[0, -2, -1]], [80, 0.002, 0], rtol=1e-12)


def test_bad_grids():
    with pytest.raises(UserError, match="fall strictly"):
        edm_sample(lambda x, s: x, jnp.ones((1, 1, 1, 1)), np.asarray([1.0, 2.0, 0.0]))
    with pytest.raises(UserError, match="noise_fn"):
        edm_sample(lambda x, s: x, jnp.ones((1, 1, 1, 1)), edm_sigmas(5), churn=Churn(S_churn=10))


@pytest.mark.device
def test_a_seed_means_the_same_in_any_company():
    alone = jnp.asarray([7], jnp.uint32)
    company = jnp.asarray([3, 7, 11], jnp.uint32)
    shape = (4, 4, 2)
    for draw in (
        functools.partial(latents, shape=shape),
        functools.partial(labels, num_classes=1000),
        functools.partial(churn_noise, step=5, shape=shape),
    ):
        np.testing.assert_array_equal(draw(alone)[0], draw(company)[1])
    draws = [latents(company, shape), churn_noise(company, 0, shape), churn_noise(company, 1, shape)]
    flat = jnp.concatenate([d.reshape(3, -1) for d in draws])
    assert np.abs(np.corrcoef(flat) - np.eye(9)).max() < 0.7 and not np.isclose(flat[0], flat[3]).any()


@pytest.mark.parametrize("wrong", [2**32, -1])
def test_a_seed_is_not_wrapped_around(wrong):
    generator = BatchedGenerator(lambda variables, seeds, labels: seeds, make_mesh(), 8)
    for draw in (lambda seeds: latents(seeds, (1,)), lambda seeds: next(generator({}, seeds, np.zeros(2)))):
        with pytest.raises(UserError, match=f"from 0 to 4294967295, and {wrong} is given"):
            draw(np.array([7, wrong]))


def test_seeds_without_labels_are_refused():
    generator = BatchedGenerator(lambda variables, seeds, labels: seeds, make_mesh(), 8)
    with pytest.raises(UserError, match="there are 3 seeds and 2 labels"):
        next(generator({}, np.arange(3), np.zeros(2)))


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(UserError, match="The batch size must be 1 or more, and is 0"):
        BatchedGenerator(lambda variables, seeds, labels: seeds, make_mesh(), 0)


@pytest.mark.parametrize("wrong", [[None, 1], ["3", None], [2**64, 1.5]])
def test_seeds_and_classes_are_integers(wrong):
    with pytest.raises(UserError, match="Seeds are a list of integers"):
        latents(wrong, (1,))
    with pytest.raises(UserError, match="Classes are integers or names, and not object"):
        choose_labels(wrong, np.arange(2), 3)


def test_the_program_of_a_generator_is_checked_once():
    traced, checked = [], []

    def generate(variables, seeds, labels):
        traced.append(seeds.shape)
        return jnp.zeros((len(seeds), 2, 2, 1))

    def check(compiled):
        checked.append(compiled.memory_analysis().output_size_in_bytes)
        if len(checked) == 1:
            raise MemoryError

    generator = BatchedGenerator(generate, make_mesh(jax.devices()[:1]), 2, check=check)
    seeds = labels = np.arange(5)
    with pytest.raises(MemoryError):
        list(generator({}, seeds, labels))
    assert len(list(generator({}, seeds, labels))) == len(list(generator({}, seeds, labels))) == 3
    assert len(checked) == 2 and checked[0] >= 2 * 2 * 2
    assert traced == [(2,)]  # once for the check and the call


def test_classes_by_number_and_by_name():
    seeds, names = np.arange(3, dtype=np.uint32), ("cat", "dog", "owl")
    for chosen in (2, "owl", [2, 2, 2], ["owl"] * 3):
        assert choose_labels(chosen, seeds, 3, names).tolist() == [2, 2, 2]
    np.testing.assert_array_equal(choose_labels(["owl", "cat", "dog"], seeds, 3, names), [2, 0, 1])
    np.testing.assert_array_equal(choose_labels(None, seeds, 3, names), labels(jnp.asarray(seeds), 3))
    assert set(choose_labels(None, np.arange(100), 3).tolist()) == {0, 1, 2}
    assert choose_labels([2], seeds, 3).tolist() == [
        2
    ]  # which whoever takes them refuses, as they are not one for each
    assert choose_labels(None, seeds, 0).tolist() == [-1, -1, -1]
    with pytest.raises(UserError, match="knows no class 'dig': did you mean 'dog'?"):
        choose_labels(["owl", "dig", "dog"], seeds, 3, names)
    with pytest.raises(UserError, match="must be from 0 to 2, and is 'owl'."):  # of a run whose data name none
        choose_labels("owl", seeds, 3)
    with pytest.raises(UserError, match="must be left out, since this model knows no classes, and is 'owl'."):
        choose_labels("owl", seeds, 0)
    for wrong, words in ((2**32 + 2, "is 4294967298"), (-1, "is -1"), (1.5, "not float64"), (True, "not bool")):
        with pytest.raises(UserError, match=words):
            choose_labels(wrong, seeds, 3)


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(5, r"int64 \[\]"), ([1.5], r"float64 \[1\]"), ([], r"float64 \[0\]"), ([2**70], "1180591620717411303424")],
)
def test_seeds_are_a_list_of_integers(seeds, words):
    with pytest.raises(UserError, match=words):
        latents(seeds, (1,))


def test_a_seed_means_the_same_whatever_generator_is_jaxs_default():
    """The draws of "rbg", which TPUs are often told to use, depend on what is vmapped beside them."""
    expected = latents(np.arange(3), (2, 2, 1))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(latents(np.arange(3), (2, 2, 1)), expected)


def test_dequantised_images_fill_the_space_between_those_of_8_bits():
    seeds, values = jnp.arange(6, dtype=jnp.uint32), jnp.asarray([0, 1, 127, 128, 254, 255], jnp.uint8)
    images = jnp.broadcast_to(values[:, None, None, None], (6, 40, 40, 1))
    u = (np.asarray(dequantise(images, seeds), np.float64) + 1) * 127.5 - values[:, None, None, None] + 0.5
    assert -1e-4 < u.min() < 0.01 and 0.99 < u.max() < 1 + 1e-4
    np.testing.assert_allclose(u.mean(axis=(1, 2, 3)), 0.5, atol=5 / (12 * 1600) ** 0.5)
    np.testing.assert_allclose(u.var(axis=(1, 2, 3)), 1 / 12, atol=0.01)


def test_signs_are_1_and_minus_1_as_often():
    drawn = np.asarray(signs(jnp.arange(4, dtype=jnp.uint32), (50, 50)))
    assert set(np.unique(drawn)) == {-1, 1} and (np.abs(drawn.mean(axis=(1, 2))) < 5 / 50).all()
    assert len({image.tobytes() for image in drawn}) == 4


def test_a_seed_means_the_same_in_float64():
    seeds, shape, black = jnp.arange(3, dtype=jnp.uint32), (2, 2, 1), jnp.zeros((3, 2, 2, 1), jnp.uint8)

    def draws():
        noise = latents(seeds, shape), churn_noise(seeds, 1, shape), signs(seeds, shape), dequantise(black, seeds)
        return labels(seeds, 10), *noise

    single = [np.asarray(a) for a in draws()]
    with enable_x64():
        double = draws()
        assert all(a.dtype == jnp.float64 for a in double[1:])
        for one, other in zip(single, double, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-7)  # equal but for what is computed from the draws


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"S_churn": -5.0}, "S_churn must be 0 or more and finite, and is -5.0"),
        ({"S_churn": float("nan")}, "S_churn must be 0 or more and finite, and is nan"),
        ({"S_noise": -1.0}, "S_noise must be 0 or more and finite, and is -1.0"),
        ({"S_min": 3.0, "S_max": 1.0}, "not 3.0 to 1.0"),
    ],
)
def test_churn_that_is_none(fields, said):
    with pytest.raises(UserError, match=said):
        Churn(**fields)


@pytest.mark.parametrize("rho", [0.0, float("inf"), float("nan")])
def test_a_grid_needs_a_finite_rho(rho):
    with pytest.raises(UserError, match=f"rho must be a finite number other than 0, and is {rho}"):
        edm_sigmas(5, rho=rho)


@pytest.mark.parametrize("rho", [1e-3, -1e-3, 0.1, 1e17])
def test_a_grid_is_not_made_of_rounding(rho):
    """80^1000 is no float, 80^10 leaves nothing of 0.002^10 beside it, and 80^1e-17 is 1."""
    with pytest.raises(UserError, match="rho is .*, with which the noise levels cannot be computed"):
        edm_sigmas(5, rho=rho)
    np.testing.assert_allclose(edm_sigmas(2, rho=1e6)[:-1], [80, 0.002], rtol=1e-6)


def test_golden_uint8(golden):
    data = golden("misc")
    with enable_x64():
        np.testing.assert_array_equal(to_uint8(jnp.asarray(data["uint8/in"])), data["uint8/out"])
        np.testing.assert_array_equal(to_uint8(data["uint8/in"]), data["uint8/out"])


@pytest.mark.parametrize("on_host", [("cpu",), ()])
def test_images_that_are_no_numbers_are_named_and_not_made_black(monkeypatch, on_host):
    """Also where the next batch is on its way, as on accelerators."""
    monkeypatch.setattr("fdm_jax.devices.ON_HOST", on_host)

    def generate(variables, seeds, labels):
        x = jnp.where(seeds >= 10, jnp.nan, jnp.where(seeds == 3, jnp.inf, 0.5))
        return jnp.broadcast_to(x[:, None, None, None], (len(seeds), 2, 2, 1))

    seeds, labels, mesh = np.array([1, 3, 2, 10, 4]), np.zeros(5, int), make_mesh(jax.devices()[:1])
    generator = BatchedGenerator(generate, mesh, 4)
    with pytest.raises(NotFinite, match=r"images of 2 of 4 seeds \(3, 10\) are not finite numbers"):
        list(generator({}, seeds, labels))
    images, last = generator({}, np.array([1, 2, 4, 5, 6]), labels)
    assert images.dtype == np.uint8 and (images == 191).all() and len(last) == 1
    images = list(BatchedGenerator(generate, mesh, 4, quantise=False)({}, seeds, labels))
    np.testing.assert_array_equal(np.isfinite(np.concatenate(images)[:, 0, 0, 0]), [True, False, True, False, True])
