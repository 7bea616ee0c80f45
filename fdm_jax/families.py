"""The three noise families, VP, VE and EDM: what is drawn, how it is weighed, how the network is wrapped.

A family says everything about D(x; sigma) = c_skip x + c_out F(c_in x, c_noise) that is not the network F:
its noise range, the training draw of sigma, the loss weight lambda(sigma) and the four coefficients
(Karras et al., arXiv 2206.00364, table 1).  Momentum (FDM) is an optional part: given one, c_in becomes
s(sigma) and nothing else changes, so a run and its baseline share every other line of code.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdm_jax.errors import UserError, nearest
from fdm_jax.momentum import Momentum


class Coefficients(NamedTuple):
    """What wraps the network at one noise level; four arrays of sigma's shape."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array


def _check_fields(owner: object, **bounds: tuple[float, float]) -> None:
    """Raise a UserError unless each named field lies strictly between its bounds."""
    for name, (low, high) in bounds.items():
        value = getattr(owner, name)
        if not low < value < high:
            asked = f"above {low:g}" + (f" and below {high:g}" if high < math.inf else " and finite")
            raise UserError(f"family.{name} must be {asked}, and is {value}.")


def _log(sigma: jax.Array) -> jax.Array:
    # At sigma = 0 the coefficient c_out is 0 and D(x; 0) = x, provided that the network's output is finite.
    return jnp.log(jnp.maximum(sigma, jnp.finfo(sigma.dtype).tiny))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(abc.ABC):
    """What VP, VE and EDM have in common.  Every method takes arrays of any shape and keeps it.

    Attributes:
      momentum: FDM's momentum, or None for the plain baseline.
    """

    momentum: Momentum | None = None

    @property
    @abc.abstractmethod
    def sigma_min(self) -> float:
        """Lowest noise level of the family, in units of the image's [-1, 1]."""

    @property
    @abc.abstractmethod
    def sigma_max(self) -> float:
        """Highest noise level of the family; may be infinite."""

    def training_draw(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """The random number behind one training noise level: u ~ U(0, 1) unless the family says otherwise."""
        return jax.random.uniform(key, shape, jnp.float32)

    @abc.abstractmethod
    def training_sigma(self, draw: jax.Array) -> jax.Array:
        """The training noise level for a draw of :meth:`training_draw`."""

    def weight(self, sigma: jax.Array) -> jax.Array:
        """lambda(sigma) of the loss, before any warm-up; 1 / sigma^2 unless the family says otherwise."""
        return 1 / sigma**2

    @abc.abstractmethod
    def plain_coefficients(self, sigma: jax.Array) -> Coefficients:
        """The coefficients of the family without momentum."""

    def coefficients(self, sigma: jax.Array) -> Coefficients:
        """c_skip, c_out, c_in, c_noise; with momentum c_in is s(sigma), FDM's one change."""
        sigma = jnp.asarray(sigma) * 1.0  # integers become floats
        plain = self.plain_coefficients(sigma)
        if self.momentum is None:
            return plain
        return plain._replace(c_in=self.momentum.scale(sigma, self.sigma_min, self.sigma_max))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VP(Family):
    """Variance preserving (Song et al. 2021): sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1, t in (0, 1].

    Attributes:
      beta_min, beta_d: the linear noise rate beta_min + beta_d t.
      epsilon_t: smallest t drawn in training; it sets sigma_min.
      num_scales: discrete steps of the original model, whose time labels 0 ... num_scales - 1 c_noise continues.
    """

    beta_min: float = 0.1
    beta_d: float = 19.9
    epsilon_t: float = 1e-5
    num_scales: int = 1000

    def __post_init__(self) -> None:
        _check_fields(self, beta_min=(0, math.inf), beta_d=(0, math.inf), epsilon_t=(0, 1), num_scales=(1, math.inf))

    @property
    def sigma_min(self) -> float:
        return math.sqrt(math.expm1(self.epsilon_t * (0.5 * self.beta_d * self.epsilon_t + self.beta_min)))

    @property
    def sigma_max(self) -> float:
        return math.sqrt(math.expm1(0.5 * self.beta_d + self.beta_min))

    def sigma_of_t(self, t: jax.Array) -> jax.Array:
        """sigma(t) = sqrt(expm1(beta_d t^2 / 2 + beta_min t)); expm1 keeps small t exact."""
        return jnp.sqrt(jnp.expm1(t * (0.5 * self.beta_d * t + self.beta_min)))

    def t_of_sigma(self, sigma: jax.Array) -> jax.Array:
        """The inverse, (sqrt(beta_min^2 + 2 beta_d L) - beta_min) / beta_d with L = ln(1 + sigma^2).

        Written as 2 L / (sqrt(...) + beta_min): the difference above loses up to 2.6 % in float32 near sigma_min.
        """
        L = jnp.log1p(sigma**2)
        return 2 * L / (jnp.sqrt(self.beta_min**2 + 2 * self.beta_d * L) + self.beta_min)

    def training_sigma(self, draw: jax.Array) -> jax.Array:
        # t = 1 + u (epsilon_t - 1), in the form that keeps its digits where u is close to 1.
        return self.sigma_of_t((1 - draw) + draw * self.epsilon_t)

    def plain_coefficients(self, sigma: jax.Array) -> Coefficients:
        return Coefficients(
            c_skip=jnp.ones_like(sigma),
            c_out=-sigma,
            c_in=1 / jnp.sqrt(sigma**2 + 1),
            c_noise=(self.num_scales - 1) * self.t_of_sigma(sigma),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VE(Family):
    """Variance exploding (Song et al. 2021): sigma log-uniform over [lowest, highest]."""

    lowest: float = 0.02
    highest: float = 100.0

    def __post_init__(self) -> None:
        _check_fields(self, lowest=(0, math.inf), highest=(self.lowest, math.inf))

    @property
    def sigma_min(self) -> float:
        return self.lowest

    @property
    def sigma_max(self) -> float:
        return self.highest

    def training_sigma(self, draw: jax.Array) -> jax.Array:
        return self.lowest * (self.highest / self.lowest) ** draw

    def plain_coefficients(self, sigma: jax.Array) -> Coefficients:
        return Coefficients(
            c_skip=jnp.ones_like(sigma), c_out=sigma, c_in=jnp.ones_like(sigma), c_noise=_log(0.5 * sigma)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM(Family):
    """Karras et al. 2022: ln sigma ~ N(P_mean, P_std^2), unit-variance network input and target.

    Attributes:
      sigma_data: standard deviation of the images in [-1, 1].
      P_mean, P_std: of ln sigma in training.
      lowest, highest: the range over which momentum's clock runs; without momentum the family has no bounds.
    """

    sigma_data: float = 0.5
    P_mean: float = -1.2
    P_std: float = 1.2
    lowest: float = 0.002
    highest: float = 80.0

    def __post_init__(self) -> None:
        _check_fields(
            self, sigma_data=(0, math.inf), P_mean=(-math.inf, math.inf), P_std=(0, math.inf),
            lowest=(0, math.inf), highest=(self.lowest, math.inf),
        )  # fmt: skip

    @property
    def sigma_min(self) -> float:
        return 0.0 if self.momentum is None else self.lowest

    @property
    def sigma_max(self) -> float:
        return math.inf if self.momentum is None else self.highest

    def training_draw(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """n ~ N(0, 1), of which ln sigma is an affine function."""
        return jax.random.normal(key, shape, jnp.float32)

    def training_sigma(self, draw: jax.Array) -> jax.Array:
        return jnp.exp(draw * self.P_std + self.P_mean)

    def weight(self, sigma: jax.Array) -> jax.Array:
        """lambda = (sigma^2 + d^2) / (sigma d)^2, d = sigma_data."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def plain_coefficients(self, sigma: jax.Array) -> Coefficients:
        variance = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / variance,
            c_out=sigma * self.sigma_data / jnp.sqrt(variance),
            c_in=1 / jnp.sqrt(variance),
            c_noise=_log(sigma) / 4,
        )


FAMILIES: dict[str, type[Family]] = {"vp": VP, "ve": VE, "edm": EDM}


def make_family(name: str, momentum: Momentum | None = None, **fields: float) -> Family:
    """The family called ``name`` ("vp", "ve" or "edm") with ``fields`` of its class set.

    Raises:
      UserError: an unknown name, or a field that the family does not have.
    """
    if name not in FAMILIES:
        raise UserError(f"There is no family {name!r}: {nearest(name, FAMILIES)}")
    cls = FAMILIES[name]
    known = {field.name for field in dataclasses.fields(cls)}
    for field in fields:
        if field not in known:
            raise UserError(f"The family {name!r} has no field {field!r}: {nearest(field, known)}")
    return cls(momentum=momentum, **fields)  # type: ignore[arg-type]
