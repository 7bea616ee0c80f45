"""Every solver: the original's numbers, measured orders, evaluations counted, the statistics of the stochastic ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from conftest import enable_x64
from test_sampling import mixture_denoiser

from fdm_jax.errors import UserError
from fdm_jax.sampling.dpm import singlestep_calls, singlestep_orders
from fdm_jax.sampling.edm import Churn, edm_calls
from fdm_jax.sampling.grids import GRIDS, edm_sigmas, log_snr_sigmas, vp_time_sigmas
from fdm_jax.sampling.linear import integrate
from fdm_jax.sampling.multistep import ipndm_calls
from fdm_jax.sampling.solvers import SOLVERS, make_calls

DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]


def run(calls, denoise, latents, start, **options):
    return jax.jit(lambda x: integrate(denoise, x, start, calls, **options))(latents)


# --- DPM-Solver++ as the original runs it ---


@pytest.mark.parametrize("kind", ["points", "gauss"])
@pytest.mark.parametrize("steps", [10, 11, 12, 25])
@pytest.mark.parametrize("denoise", [0, 1])
def test_golden_dpm_solver(golden, kind, steps, denoise):
    """The original computes its coefficients in float32, which bounds the agreement."""
    data = golden("samplers")
    prefix = f"dpm/{kind}_inf_steps{steps}_denoise{denoise}"
    orders = singlestep_orders(steps - denoise)
    np.testing.assert_array_equal(orders, data[f"dpm/points_inf_steps{steps}_denoise{denoise}/orders"])
    sigmas = log_snr_sigmas(len(orders) + 1)
    np.testing.assert_allclose(
        sigmas[:-1], data[f"dpm/points_inf_steps{steps}_denoise{denoise}/timesteps_outer"], rtol=1e-6
    )
    if denoise:
        calls = make_calls("dpmpp", steps, log_snr_sigmas)
    else:
        calls = singlestep_calls(sigmas[:-1], orders)
    called = np.array([call.sigma for call in calls])
    np.testing.assert_allclose(called, data[f"{prefix}/sigmas_called"], rtol=1e-6)
    assert len(calls) == steps
    with enable_x64():
        out = run(calls, mixture_denoiser(data, kind), jnp.asarray(data["latents"]), 80.0)
    scale = np.abs(data[f"{prefix}/out"]).max()
    np.testing.assert_allclose(out, data[f"{prefix}/out"], atol=1e-6 * scale)
    # And in the range of the family, with other limits.
    if steps == 25 and denoise:
        with enable_x64():
            calls = make_calls("dpmpp", 25, lambda points: log_snr_sigmas(points, 0.01, 20.0))
            out = run(calls, mixture_denoiser(data, kind), jnp.asarray(data["latents"]), 20.0)
        expected = data[f"dpm/{kind}_inf_steps25_smin0.01_smax20/out"]
        np.testing.assert_allclose(out, expected, atol=1e-6 * np.abs(expected).max())


# --- Orders and evaluations ---


def gaussian(x, sigma):
    """The ideal denoiser of N(0, 0.5^2)."""
    return x * 0.25 / (0.25 + sigma**2)


def two_peaks(x, sigma):
    """The ideal denoiser of an even mixture of N(-1, 0.3^2) and N(0.5, 0.3^2), per pixel."""
    centres = jnp.asarray([-1.0, 0.5], x.dtype)
    variance = 0.09 + sigma**2
    p = jax.nn.softmax(-((x[..., None] - centres) ** 2) / (2 * variance))
    return (p * (0.09 * x[..., None] + sigma**2 * centres) / variance).sum(-1)


LOW, HIGH = 0.05, 80.0
START = np.array([1.0, 0.3, -0.7, 0.01])


def end(name, steps, denoise):
    """Without the step to 0, which is of order 1 whatever the solver."""
    solver = SOLVERS[name]
    calls = solver.calls(edm_sigmas(solver.points(steps), LOW, HIGH), steps)
    if name.startswith("unipc"):  # the call there corrects the step that led to it
        calls[-1] = calls[-1]._replace(x=calls[-1].anchor)
    else:
        calls.pop()
    with enable_x64():
        return np.asarray(run(calls, denoise, jnp.asarray(START.reshape(1, 2, 2, 1)), HIGH)).ravel()


@functools.cache
def end_of_two_peaks():
    def slope(log_sigma, x):
        sigma = np.exp(log_sigma)
        p = scipy.special.softmax(-((x[:, None] - [-1.0, 0.5]) ** 2) / (2 * (0.09 + sigma**2)), axis=1)
        D = (p * (0.09 * x[:, None] + sigma**2 * np.array([-1.0, 0.5])) / (0.09 + sigma**2)).sum(1)
        return x - D

    span = np.log([HIGH, LOW])
    return scipy.integrate.solve_ivp(slope, span, HIGH * START, "DOP853", rtol=1e-13, atol=1e-13).y[:, -1]


EXACT = {
    gaussian: lambda: HIGH * START * (0.25 + LOW**2) ** 0.5 / (0.25 + HIGH**2) ** 0.5,
    two_peaks: end_of_two_peaks,
}


@pytest.mark.parametrize("denoise", [gaussian, two_peaks])
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "dpmpp"])
def test_order_of_convergence(name, denoise):
    """The Gaussian's end is known in closed form; the mixture's is SciPy's, integrated to thirteen digits."""
    exact = EXACT[denoise]()
    steps = (160, 320)
    errors = [np.linalg.norm(end(name, n, denoise) - exact) for n in steps]
    # Intervals, not steps, are what doubles.
    points = [SOLVERS[name].points(n) - 1 for n in steps]
    orders = np.log(np.divide(errors[:-1], errors[1:])) / np.log(np.divide(points[1:], points[:-1]))
    assert orders[-1] == pytest.approx(SOLVERS[name].order, abs=0.3), (errors, orders)


def test_ipndm_is_of_order_four_where_steps_are_even():
    """On the Gaussian's ODE from 4 to 1, with the first steps, which are of lower order, made exact by small ones."""
    slope = lambda x, sigma: x * sigma / (0.25 + sigma**2)  # noqa: E731
    exact = lambda sigma: np.sqrt(0.25 + sigma**2)  # noqa: E731
    errors = []
    for steps in (160, 320):
        sigmas = np.linspace(4, 1, steps + 1)
        # The table's own weights, fed with exact slopes at the start.
        weights = [call.x.of_denoised for call in ipndm_calls(sigmas)]
        x, slopes = exact(sigmas[3]), [slope(exact(s), s) for s in sigmas[2::-1]]
        for i in range(3, steps):
            slopes = [slope(x, sigmas[i]), *slopes[:3]]
            x += np.dot(weights[i], slopes)
        errors.append(abs(x - exact(1.0)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.3)


@pytest.mark.parametrize(
    "case", ["dpmpp-2m/8", "dpmpp-2m/20", "unipc-1/8", "unipc-1/20", "unipc-2/8", "unipc-2/20", "heun/8"]
)
def test_another_library(golden, case):
    """Hugging Face diffusers 0.42.1 on the mixture, from its schedulers' own grids (whose numbers are float32)."""
    data = golden("diffusers_solvers")
    sigmas = data[f"{case}/sigmas"]
    with enable_x64():
        calls = make_calls(case.split("/")[0], len(sigmas) - 1, sigmas)
        out = run(calls, two_peaks, jnp.asarray(START.reshape(1, 2, 2, 1)), sigmas[0])
    np.testing.assert_allclose(np.ravel(out), data[f"{case}/x"], atol=5e-7)


COST = {
    "heun": lambda n: 2 * n - 1, "dpmpp-2s": lambda n: 2 * n - 1, "dpmpp-3s": lambda n: 3 * n - 2,
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [2, 5, 13, 18])
def test_evaluations_are_those_that_are_claimed(name, steps):
    claimed = COST.get(name, lambda n: n)(steps)
    calls = make_calls(name, steps, edm_sigmas)
    assert len(calls) == claimed
    assert SOLVERS[name].steps_of(claimed) == steps
    seen = []

    def denoise(x, sigma):
        jax.debug.callback(lambda s: seen.append(float(s)), sigma)
        return 0.5 * x

    noise = {"noise_fn": lambda i: jnp.zeros((1, 1, 1, 1))}
    run(calls, denoise, jnp.ones((1, 1, 1, 1)), calls[0].sigma, **noise).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(
        sorted(seen, reverse=True), sorted((call.sigma for call in calls), reverse=True), rtol=1e-6
    )


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_solver_on_every_grid_ends_near_the_data(name, grid):
    """Roughly: 24 steps evenly spaced in VP's time leave the last one so long that 3M overshoots."""
    calls = make_calls(name, 24, lambda points: GRIDS[grid](points, 0.002, 80.0))
    latents = jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
    noise = lambda step: jax.random.normal(jax.random.key(step), latents.shape)  # noqa: E731
    out = np.asarray(run(calls, two_peaks, latents, 80.0, noise_fn=noise))
    assert np.isfinite(out).all() and abs(out).max() < 4
    assert 0.2 < (out > -0.25).mean() < 0.8


# --- Stochastic solvers ---


@pytest.mark.parametrize(
    "name,steps,churn",
    [
        pytest.param("ancestral", 1500, None, marks=pytest.mark.slow),
        ("sde-dpmpp-2m", 300, None),
        ("heun", 150, Churn(S_churn=40)),
    ],
)
def test_samples_have_the_exact_mean_and_covariance(name, steps, churn):
    """An even mixture of N(-1, 0.3^2) and N(0.5, 0.3^2): mean -0.25, variance 0.09 + 0.75^2, pixels independent."""
    calls = make_calls(name, steps, edm_sigmas, churn)
    n = 20_000
    latents = jax.random.normal(jax.random.key(1), (n, 1, 2, 1))
    noise = lambda step: jax.random.normal(jax.random.fold_in(jax.random.key(2), step), latents.shape)  # noqa: E731
    out = np.asarray(run(calls, two_peaks, latents, 80.0, noise_fn=noise), np.float64).reshape(n, 2)
    variance = 0.09 + 0.75**2
    fourth = 3 * 0.09**2 + 6 * 0.09 * 0.75**2 + 0.75**4
    np.testing.assert_allclose(out.mean(axis=0), -0.25, atol=3 * (variance / n) ** 0.5)
    covariance = np.cov(out.T)
    np.testing.assert_allclose(np.diag(covariance), variance, atol=3 * ((fourth - variance**2) / n) ** 0.5)
    assert abs(covariance[0, 1]) < 3 * variance / n**0.5


@pytest.mark.parametrize(
    "name, rows",
    [
        # From 4 to 2: sigma_up = 2 sqrt(16 - 4) / 4, sigma_down = sqrt(4 - 3) = 1.  From 2 to 1: half of each.
        ("ancestral", [(1 / 4, (3 / 4,), 0), (1 / 4, (3 / 4,), 3**0.5), (0, (1,), 3**0.5 / 2)]),
        # h = log 2, so that e^-2h is 1/4; from the second step on r is 1.
        (
            "sde-dpmpp-2m",
            [(1 / 4, (3 / 4, 0), 0), (1 / 4, (9 / 8, -3 / 8), 2 * 0.75**0.5), (0, (1,), 0.75**0.5)],
        ),
    ],
)
def test_steps_of_the_stochastic_solvers_by_hand(name, rows):
    calls = SOLVERS[name].calls(np.array([4.0, 2.0, 1.0, 0.0]), 3)
    assert [call.sigma for call in calls] == [4, 2, 1] and [call.step for call in calls] == [0, 1, 2]
    for call, (of_anchor, of_denoised, noise) in zip(calls, rows, strict=True):
        np.testing.assert_allclose(call.x.of_anchor, of_anchor, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(call.x.of_denoised, of_denoised, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(call.noise, noise, rtol=1e-12)
        assert call.anchor == call.x


# --- Grids and bad input ---


def test_grids():
    for grid in GRIDS.values():
        sigmas = grid(12, 0.01, 50.0)
        assert len(sigmas) == 13 and sigmas[-1] == 0 and (np.diff(sigmas) < 0).all()
        np.testing.assert_allclose(sigmas[[0, -2]], [50.0, 0.01], rtol=1e-12)
        np.testing.assert_allclose(grid(1, 0.01, 50.0), [50.0, 0.0], rtol=1e-12)
        np.testing.assert_allclose(grid(2, 0.01, 50.0), [50.0, 0.01, 0.0], rtol=1e-12)
    ratios = np.diff(np.log(log_snr_sigmas(10)[:-1]))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-12)
    # sigma(t) of the VP process at t = 1, 1/2 and near 0, and times evenly spaced.
    sigmas = vp_time_sigmas(9, 0.0010005, 152.16697)
    t = np.array([((0.01 + 39.8 * np.log1p(s**2)) ** 0.5 - 0.1) / 19.9 for s in sigmas[:-1]])
    np.testing.assert_allclose(t, np.linspace(1, 1e-5, 9), atol=1e-4)
    root = np.sqrt(
        [((0.01 + 39.8 * np.log1p(s**2)) ** 0.5 - 0.1) / 19.9 for s in GRIDS["vp-quadratic"](9, 0.01, 50.0)[:-1]]
    )
    np.testing.assert_allclose(np.diff(root), np.diff(root)[0], rtol=1e-9)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("hoin", 5, edm_sigmas), "no solver 'hoin': did you mean 'heun'"),
        (("dpmpp", 1, edm_sigmas), "dpmpp takes 2 steps or more, not 1"),
        (("heun", 0, edm_sigmas), "heun takes 1 step or more, not 0"),
        (("dpmpp", 10**20, edm_sigmas), "steps must be from 1 to 100,000, and is 100000000000000000000"),
        (("euler", 3, [3.0, 2.0, 0.0]), "3 steps of euler go through 3 noise levels and 0, and 2 are given"),
        (("euler", 2, [2.0, 3.0, 0.0]), "fall strictly"),
        (("euler", 2, [2.0, 2.0, 0.0]), "fall strictly"),
        (("euler", 2, [2.0, 1.0, -1.0]), "end at 0 or above"),
        (("dpmpp-2m", 5, edm_sigmas, Churn(S_churn=1)), "Churn belongs to the solvers heun and euler"),
        (("ancestral", 2, [3.0, 2.0, 1.0]), "must end at 0"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(UserError, match=words):
        make_calls(*arguments)


def test_noise_needs_its_function():
    with pytest.raises(UserError, match="noise_fn"):
        integrate(gaussian, jnp.ones((1, 1, 1, 1)), 80.0, make_calls("ancestral", 5, edm_sigmas))
    assert all(call.noise == 0 for call in edm_calls(edm_sigmas(5)))
