"""The oscillator against the ODE and against SGD with momentum itself; s against golden numbers."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import enable_x64
from scipy.integrate import solve_ivp

from fdm_jax.errors import UserError
from fdm_jax.momentum import Momentum, mean_response


@pytest.mark.parametrize("damping", [0.0, 0.3, 0.999, 1.0, 1.001, 2.5, 20.0])
def test_mean_response_solves_the_oscillator(damping):
    B = np.linspace(0, 12, 40)
    solution = solve_ivp(
        lambda _, x: [x[1], -2 * damping * x[1] - x[0]], (0, 12), [1.0, 0.0], t_eval=B, rtol=1e-11, atol=1e-13
    )
    with enable_x64():
        np.testing.assert_allclose(mean_response(jnp.asarray(B), damping), solution.y[0], atol=2e-9)


def test_regimes_meet_at_critical_damping():
    B = jnp.linspace(0, 5, 11)
    for near in (1 - 1e-4, 1 + 1e-4):
        np.testing.assert_allclose(mean_response(B, near), mean_response(B), atol=1e-4)


def test_overdamped_response_does_not_overflow():
    assert 0 < float(mean_response(200.0, 1.5)) < 1e-25


def test_time_varying_rate_is_critical_in_its_clock():
    """(1 + B) e^-B solves x'' + (2 b - b'/b) x' + b^2 x = 0 for b(t) = 0.1 + 19.9 t."""

    def rhs(t, x):
        b = 0.1 + 19.9 * t
        return [x[1], -(2 * b - 19.9 / b) * x[1] - b * b * x[0]]

    t = np.linspace(0, 1, 21)
    solution = solve_ivp(rhs, (0, 1), [1.0, 0.0], t_eval=t, rtol=1e-11, atol=1e-14)
    with enable_x64():
        np.testing.assert_allclose(mean_response(Momentum().clock(jnp.asarray(t))), solution.y[0], atol=1e-8)


@pytest.mark.parametrize("damping", [0.5, 1.0, 1.5])
def test_mean_of_momentum_sgd_converges_to_the_kernel(damping):
    """Heavy-ball SGD on f(x) = |x|^2 / 2 with noisy gradients:

        v <- (1 - 2 zeta h) v - h (x + xi),   x <- x + h v,

    the semi-implicit step of the oscillator with rate 1.  The mean over many runs tends to m(B) at B = n h.
    """
    runs, end = 20_000, 3.0
    rng = np.random.default_rng(0)

    def mean_at_end(h):
        x, v = np.ones(runs), np.zeros(runs)
        for _ in range(round(end / h)):
            v = (1 - 2 * damping * h) * v - h * (x + rng.standard_normal(runs))
            x = x + h * v
        return x.mean(), x.std() / np.sqrt(runs)

    errors = []
    for h in (0.1, 0.05, 0.025, 0.0125):
        mean, deviation = mean_at_end(h)
        errors.append(abs(mean - float(mean_response(end, damping))))
        assert errors[-1] < 1.0 * h + 4 * deviation
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", ["fdm_edm_m1", "fdm_edm_m2", "fdm_ve_m1", "fdm_vp_m1", "fdm_vp_m2"])
@pytest.mark.parametrize("part", ["", "ext_"])
def test_golden_scale(golden, name, part):
    data = golden("noise_schedule")
    momentum = Momentum(multiplier=float(name[-1]))
    low, high = data[f"{name}/sigma_min_max"]
    sigma = data[f"{name}/{part}sigma"]
    with enable_x64():
        s = momentum.scale(jnp.asarray(sigma, jnp.float64), low, high)
        np.testing.assert_allclose(s, data[f"{name}/{part}c_in_f64"], rtol=1e-6)
    if not part:
        # float32: sigma's own rounding is multiplied by up to 40 (see the docstring).
        s = momentum.scale(jnp.asarray(sigma), low, high)
        assert s.dtype == jnp.float32
        # The exp of an accelerator is coarser: 4.0e-6 was seen on an H200.
        np.testing.assert_allclose(s, data[f"{name}/c_in_f64"], rtol=3e-6 if jax.default_backend() == "cpu" else 5e-6)


def test_scale_is_differentiable():
    slope = jax.grad(lambda sigma: Momentum(multiplier=2.0).scale(sigma, 0.002, 80.0))
    assert float(slope(1.0)) < 0 and np.isfinite(float(slope(0.0)))


@pytest.mark.parametrize("bad", [{"multiplier": -1.0}, {"damping": -0.1}, {"beta_d": float("nan")}])
def test_bad_values_are_named(bad):
    with pytest.raises(UserError, match="must be 0 or more"):
        Momentum(**bad)


@pytest.mark.parametrize("span", [(0.0, float("inf")), (1.0, 1.0)])
def test_a_clock_needs_a_finite_range(span):
    with pytest.raises(UserError, match=f"finite noise range, and this is {span[0]} to {span[1]}"):
        Momentum().scale(jnp.ones(1), *span)


def test_overdamped_response_keeps_its_digits_near_critical_damping():
    """(1 + B) e^-B is the limit; the difference of two exponentials over a small w would lose it in float32."""
    B = np.array([0.01, 0.1, 1.0, 5.0, 10.0], np.float32)
    limit = (1 + B.astype(np.float64)) * np.exp(-B.astype(np.float64))
    for excess in (1e-8, 1e-12):
        np.testing.assert_allclose(mean_response(jnp.asarray(B), 1 + excess), limit, rtol=2e-6)


def test_a_momentum_can_be_made_before_jax_is_started():
    """As `jax.distributed.initialize` must come before anything that JAX computes."""
    code = (
        "from fdm_jax.families import EDM; from fdm_jax.momentum import Momentum; from jax._src import xla_bridge;"
        "EDM(momentum=Momentum(multiplier=2.0)); assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tiny.ROOT)
