"""The coefficients of all variants against the original's float64 columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64

from fdm_jax.errors import UserError
from fdm_jax.families import EDM, VE, VP, make_family
from fdm_jax.momentum import Momentum

# The original's VE ignores its multiplier, so its columns for 2 are those for 1.
VARIANTS = {
    "vp": VP(),
    "ve": VE(),
    "edm": EDM(),
    "fdm_vp_m1": VP(momentum=Momentum(multiplier=1.0)),
    "fdm_vp_m2": VP(momentum=Momentum(multiplier=2.0)),
    "fdm_ve_m1": VE(momentum=Momentum(multiplier=1.0)),
    "fdm_ve_m2": VE(momentum=Momentum(multiplier=1.0)),
    "fdm_edm_m1": EDM(momentum=Momentum(multiplier=1.0)),
    "fdm_edm_m2": EDM(momentum=Momentum(multiplier=2.0)),
}


@pytest.mark.parametrize("part", ["", "ext_"])
@pytest.mark.parametrize("name", VARIANTS)
def test_golden_coefficients(golden, name, part):
    data = golden("noise_schedule")
    # The original rounds VP's range to float32 before it sets the clock: 2e-6 inside the range, and up to three
    # times sigma_max, where s is 1e-37, more.  (test_momentum puts the rounded range in and needs 1e-6.)
    c_in_rtol = (1e-4 if part else 2e-6) if name.startswith("fdm_vp") else 1e-6
    with enable_x64():
        c = VARIANTS[name].coefficients(jnp.asarray(data[f"{name}/{part}sigma"], jnp.float64))
        for field in c._fields:
            rtol = c_in_rtol if field == "c_in" else 1e-6
            expected = data[f"{name}/{part}{field}_f64"]
            np.testing.assert_allclose(getattr(c, field), expected, rtol=rtol, atol=1e-300, err_msg=field)


@pytest.mark.parametrize("name", VARIANTS)
def test_golden_coefficients_in_float32(golden, name):
    data = golden("noise_schedule")
    c = jax.jit(VARIANTS[name].coefficients)(jnp.asarray(data[f"{name}/sigma"]))
    for field in c._fields:
        value = getattr(c, field)
        assert value.dtype == jnp.float32
        # s multiplies the rounding of sigma by up to 40; everything else keeps 1e-6 (5e-7 absolute for the logarithm).
        rtol = 4e-6 if name.startswith("fdm") and field == "c_in" else 1e-6
        np.testing.assert_allclose(value, data[f"{name}/{field}_f64"], rtol=rtol, err_msg=field)


def test_vp_sigma_and_its_inverse(golden):
    data = golden("noise_schedule")
    family = VP()
    with enable_x64():
        np.testing.assert_allclose(
            family.sigma_of_t(data["vp/vp_t"].astype(float)), data["vp/vp_sigma_of_t_f64"], rtol=1e-9
        )
        t = family.t_of_sigma(jnp.asarray(data["vp/sigma"], jnp.float64))
        np.testing.assert_allclose(t, data["vp/vp_sigma_inv_of_sigma_f64"], rtol=1e-9)
    assert family.sigma_min == pytest.approx(0.0010005, rel=1e-4)
    assert family.sigma_max == pytest.approx(152.167, rel=1e-5)


def test_vp_round_trip_near_sigma_min_in_float32():
    family = VP()
    t = jnp.asarray(np.geomspace(1e-7, 1, 200), jnp.float32)
    np.testing.assert_allclose(family.t_of_sigma(family.sigma_of_t(t)), t, rtol=2e-6)


def test_training_draws():
    u = jnp.asarray([0.0, 1.0])
    np.testing.assert_allclose(VP().training_sigma(u), [VP().sigma_max, VP().sigma_min], rtol=1e-4)
    np.testing.assert_allclose(VE().training_sigma(u), [0.02, 100.0], rtol=1e-5)
    log_sigma = jnp.log(EDM().training_sigma(EDM().training_draw(jax.random.key(0), (20_000,))))
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=0.03)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("family", [VP(), VE(), EDM()])
def test_weight_makes_the_effective_target_uniform(family):
    """lambda c_out^2 = 1: the design rule of all three weights (Karras et al., eq. 144)."""
    sigma = jnp.asarray([0.02, 0.5, 3.0, 70.0])
    np.testing.assert_allclose(family.weight(sigma) * family.coefficients(sigma).c_out ** 2, 1.0, rtol=1e-5)


@pytest.mark.parametrize("family", VARIANTS.values())
def test_zero_noise_stays_finite(family):
    c = family.coefficients(jnp.zeros(1))
    assert all(np.isfinite(value).all() for value in c)
    assert float(c.c_out[0]) == 0 and float(c.c_skip[0]) == 1


def test_momentum_changes_c_in_alone():
    sigma = jnp.geomspace(0.01, 50, 9)
    for cls in (VP, VE, EDM):
        plain, fast = cls().coefficients(sigma), cls(momentum=Momentum(multiplier=2.0)).coefficients(sigma)
        for field in ("c_skip", "c_out", "c_noise"):
            np.testing.assert_array_equal(getattr(plain, field), getattr(fast, field))
        assert np.abs(plain.c_in - fast.c_in).max() > 0.01


def test_ranges():
    assert (EDM().sigma_min, EDM().sigma_max) == (0.0, float("inf"))
    assert (EDM(momentum=Momentum()).sigma_min, EDM(momentum=Momentum()).sigma_max) == (0.002, 80.0)


def test_make_family_names_what_is_wrong():
    assert make_family("edm", sigma_data=0.3).sigma_data == 0.3
    with pytest.raises(UserError, match="no family 'edn': did you mean 'edm'"):
        make_family("edn")
    with pytest.raises(UserError, match="no field 'sigma_dat': did you mean 'sigma_data'"):
        make_family("edm", sigma_dat=0.3)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("edm", {"sigma_data": 0.0}, "family.sigma_data must be above 0 and finite, and is 0.0"),
        ("edm", {"P_std": float("nan")}, "family.P_std must be above 0 and finite, and is nan"),
        ("edm", {"lowest": 80.0}, "family.highest must be above 80 and finite, and is 80.0"),
        ("ve", {"lowest": 5.0, "highest": 1.0}, "family.highest must be above 5 and finite, and is 1.0"),
        ("ve", {"lowest": 0.0}, "family.lowest must be above 0 and finite, and is 0.0"),
        ("vp", {"beta_d": 0.0}, "family.beta_d must be above 0 and finite, and is 0.0"),
        ("vp", {"num_scales": 1}, "family.num_scales must be above 1 and finite, and is 1"),
        ("vp", {"epsilon_t": -1.0}, "family.epsilon_t must be above 0 and below 1, and is -1.0"),
    ],
)
def test_values_that_make_no_family_are_named(name, fields, said):
    with pytest.raises(UserError, match=said):
        make_family(name, **fields)
