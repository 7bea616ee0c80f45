r"""From SGD with momentum to a diffusion kernel: the damped oscillator and FDM's scale s.

The forward process of a diffusion is SGD on a time-varying quadratic.  Heavy-ball momentum turns the
decay of its mean into a damped oscillator with rate b and damping ratio zeta,

    x'' + 2 zeta b x' + b^2 x = 0,     x(0) = x0,  x'(0) = 0.

Written in the clock B(t) = integral of b, the mean response x(t) / x0 is a function of B alone
(:func:`mean_response`).  Critical damping (zeta = 1) decays fastest without oscillating; it is the kernel
of the Fast Diffusion Model (Wu et al., arXiv 2306.06991):

    s(sigma) = (1 + B) e^(-B).

For a rate that changes with time, (1 + B) e^(-B) solves x'' + (2 b - b'/b) x' + b^2 x = 0, which is
critical damping in the clock B rather than in t.

The noisy image is x_t = s (y + sigma n), so momentum reaches a denoiser in one place only: its network is
shown s(sigma) (y + sigma n).  Everything else stays as in the family without momentum.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from fdm_jax.errors import UserError


def mean_response(B: jax.Array | float, damping: float = 1.0) -> jax.Array:
    """Mean x(t) / x0 of the damped oscillator released at rest, at clock reading ``B``.

    | regime                  | m(B)                                                                     |
    |-------------------------|--------------------------------------------------------------------------|
    | under-damped, zeta < 1  | e^(-zeta B) (cos w B + zeta/w sin w B),    w = sqrt(1 - zeta^2)          |
    | critical, zeta = 1      | e^(-B) (1 + B)                                                           |
    | over-damped, zeta > 1   | e^(-zeta B) (cosh w B + zeta/w sinh w B),  w = sqrt(zeta^2 - 1)          |

    Args:
      B: the clock, the integral of the rate; any shape, no unit.
      damping: the damping ratio zeta >= 0, a plain number because it selects the formula.

    Returns:
      An array of B's shape, 1 at B = 0.

    Raises:
      UserError: ``damping`` is negative or not finite.
    """
    _check_damping(damping)
    B = jnp.asarray(B)
    if damping == 1:
        return jnp.exp(-B) * (1 + B)
    if damping < 1:
        w = math.sqrt((1 - damping) * (1 + damping))
        return jnp.exp(-damping * B) * (jnp.cos(w * B) + damping / w * jnp.sin(w * B))
    # cosh and sinh overflow where their product with the exponential is small, and their sum cancels near critical
    # damping: the slower exponential, 1 / (zeta + w) = zeta - w, is taken out of both.
    w = math.sqrt((damping - 1) * (damping + 1))
    return 0.5 * jnp.exp(-B / (damping + w)) * (1 + jnp.exp(-2 * w * B) - damping / w * jnp.expm1(-2 * w * B))


def _check_damping(damping: float) -> None:
    if not 0 <= damping < math.inf:
        raise UserError(f"The damping ratio must be 0 or more and finite, and is {damping}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum:
    """FDM's clock over a noise range, and the scale s that it gives.

    Attributes:
      multiplier: m, speeds the clock up; the authors use 2 for EDM and VP on CIFAR-10, else 1 (see configs).
      beta_min: rate at t = 0, before the multiplier.
      beta_d: growth of the rate over t in [0, 1].
      damping: zeta; 1 is FDM, other values are there to study.
    """

    multiplier: float = 1.0
    beta_min: float = 0.1
    beta_d: float = 19.9
    damping: float = 1.0

    def __post_init__(self) -> None:
        for name in ("multiplier", "beta_min", "beta_d"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"momentum.{name} must be 0 or more and finite, and is {getattr(self, name)}.")
        _check_damping(self.damping)

    def clock(self, t: jax.Array) -> jax.Array:
        """B(t) = m (beta_min t + beta_d t^2 / 2); t is the place in the noise range, not clipped to [0, 1]."""
        return self.multiplier * t * (self.beta_min + 0.5 * self.beta_d * t)

    def scale(self, sigma: jax.Array, sigma_min: float, sigma_max: float) -> jax.Array:
        """FDM's s(sigma) = m(B(t)) with t = (sigma - sigma_min) / (sigma_max - sigma_min), linear and not clipped.

        The result is as exact as its type allows, but s falls by e^-20 over the range and so multiplies a
        relative rounding of sigma by up to 40: about 2e-6 relative in float32, 1e-14 in float64.

        Raises:
          UserError: a noise range without end, over which the clock would stand still, or one that is none.
        """
        if not sigma_min < sigma_max < math.inf:
            raise UserError(f"Momentum's clock runs over a finite noise range, and this is {sigma_min} to {sigma_max}.")
        return mean_response(self.clock((sigma - sigma_min) / (sigma_max - sigma_min)), self.damping)
