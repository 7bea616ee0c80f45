"""All solvers in one form: a table of linear combinations, run by one scan over the calls of the denoiser.

A solver keeps an anchor (x where the current step began), x (where the denoiser is called next) and the last few
denoised images D_0 (newest), D_1, ... (or other combinations of x and D, such as slopes).  A row of its table is one call:

    noise eps is added to anchor and x;  D_0 = D(x; sigma)
    anchor <- a anchor + sum_j b_j D_j,   and from the anchor as it was:   x <- c anchor + sum_j d_j D_j

The numbers are made in float64 before anything is compiled, so that a solver is a few lines of NumPy, and the network is
compiled once whatever the solver.  The number of rows is the number of function evaluations (NFE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.denoiser import DenoiseFn
from fdm_jax.errors import UserError


class Combination(NamedTuple):
    """of_anchor * anchor + sum_j of_denoised[j] * D_j, newest first."""

    of_anchor: float
    of_denoised: Sequence[float] = ()

    def after(self, first: Combination) -> Combination:
        """This combination of an anchor that is itself ``first``, written in the anchor before."""
        n = max(len(self.of_denoised), len(first.of_denoised))
        ours, theirs = (np.pad(np.asarray(c.of_denoised, float), (0, n - len(c.of_denoised))) for c in (self, first))
        return Combination(self.of_anchor * first.of_anchor, tuple(ours + self.of_anchor * theirs))


STAY = Combination(1.0)


class Call(NamedTuple):
    """One call of the denoiser.

    Attributes:
      sigma: where D is called.
      x: the next place.
      anchor: the next anchor.
      noise: standard deviation of what is added to anchor and x before the call.
      step: which step's noise that is.
      remember: (p, q): what is kept as D_0 is p x + q D.
    """

    sigma: float
    x: Combination
    anchor: Combination = STAY
    noise: float = 0.0
    step: int = 0
    remember: tuple[float, float] = (0.0, 1.0)


def step_call(sigma: float, x: Combination, noise: float = 0.0, step: int = 0) -> Call:
    """A call that ends a step: the anchor moves along."""
    return Call(sigma, x, x, noise, step)


def check_grid(sigmas: np.ndarray) -> np.ndarray:
    """Noise levels as float64 [N + 1].

    Raises:
      UserError: they do not fall strictly, or go below 0.
    """
    sigmas = np.asarray(sigmas, np.float64)
    if (
        sigmas.ndim != 1
        or len(sigmas) < 2
        or not (np.diff(sigmas) < 0).all()
        or not 0 <= sigmas[-1] < sigmas[0] < np.inf
    ):
        raise UserError("The noise levels of a sampler must fall strictly and end at 0 or above.")
    return sigmas


def euler(sigma: float, to: float) -> Combination:
    """x + (to - sigma) (x - D) / sigma: Euler's step in sigma, which is DDIM; to 0 it gives D itself."""
    return Combination(to / sigma, (1 - to / sigma,))


def integrate(
    denoise_fn: DenoiseFn,
    latents: jax.Array,
    start: float,
    calls: Sequence[Call],
    noise_fn: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Run a solver's table.

    Args:
      denoise_fn: D(x, sigma) with sigma a scalar.
      latents: standard normal, [B, H, W, C]; their type is what is computed in.
      start: the first noise level; the solver begins at start * latents.
      calls: the table.
      noise_fn: gives standard normal noise, of latents' shape, for a step; needed if a call adds noise.

    Returns:
      Images like the latents.

    Raises:
      UserError: noise is needed, and there is no noise_fn.
    """
    stochastic = any(call.noise > 0 for call in calls)
    if stochastic and noise_fn is None:
        raise UserError("A stochastic sampler needs a noise_fn that gives the noise of each step.")
    remembers_x = any(call.remember != (0.0, 1.0) for call in calls)
    depth = max(len(c.of_denoised) for call in calls for c in (call.x, call.anchor))
    latents = jnp.asarray(latents) * 1.0  # integers become floats, and NumPy's float64 what JAX computes in
    dtype = latents.dtype

    def column(values: list[Any], kind: Any = dtype) -> jax.Array:
        return jnp.asarray(np.asarray(values), kind)

    def weights(combinations: list[Combination]) -> tuple[jax.Array, jax.Array]:
        rows = [np.pad(np.asarray(c.of_denoised, np.float64), (0, depth - len(c.of_denoised))) for c in combinations]
        return column([c.of_anchor for c in combinations]), column(rows)

    table = (
        column([call.sigma for call in calls]),
        column([call.noise for call in calls]),
        column([call.step for call in calls], jnp.int32),
        column([call.remember for call in calls]),
        weights([call.anchor for call in calls]),
        weights([call.x for call in calls]),
    )

    def evaluate(carry: tuple[jax.Array, ...], row: Any):  # type: ignore[no-untyped-def]
        anchor, x, denoised = carry
        sigma, noise, step, (of_x, of_D), *combinations = row
        if stochastic:
            assert noise_fn is not None
            draw = noise_fn
            added = jax.lax.cond(noise > 0, lambda: noise * draw(step).astype(dtype), lambda: jnp.zeros_like(x))
            anchor, x = anchor + added, x + added
        newest = denoise_fn(x, sigma).astype(dtype)
        if remembers_x:
            newest = of_x * x + of_D * newest
        denoised = jnp.concatenate([newest[None], denoised[:-1]])
        anchor, x = (
            a * anchor + sum(b[j] * denoised[j] for j in range(depth)) for a, b in combinations
        )  # fmt: skip
        return (anchor, x, denoised), None

    x = latents * jnp.asarray(start, dtype)
    (_, x, _), _ = jax.lax.scan(evaluate, (x, x, jnp.zeros((depth, *x.shape), dtype)), table)
    return x
