"""The probability-flow ODE dx/dsigma = (x - D(x; sigma)) / sigma by an adaptive solver of order 8 (diffrax).

Slow and exact: what samplers are measured by, and what likelihoods are integrated along.  In t = ln sigma the ODE is
dx/dt = x - D(x; e^t) (Karras et al., arXiv 2206.00364, equation 1 with s = 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp

from fdm_jax.denoiser import DenoiseFn
from fdm_jax.errors import UserError
from fdm_jax.sampling.grids import check_range

MAX_STEPS = 4096
FIRST_STEP = 0.1  # in ln sigma; the solver finds its own from there
SMALLEST_STEP = 1e-9  # less than is ever needed: asked for where D is not finite

# (D(., sigma), x) -> D(x; sigma) [B, ...] and the trace of its derivative in x, or an estimate, [B]
TraceFn = Callable[[Callable[[jax.Array], jax.Array], jax.Array], tuple[jax.Array, jax.Array]]


class Solved(NamedTuple):
    """Where an adaptive solver ended.

    Attributes:
      x: what was asked for.
      steps: that it took, rejected ones included; each calls the denoiser 13 times, and the first one once more.
      ok: whether it got to the end with the accuracy asked for.
    """

    x: Any
    steps: jax.Array
    ok: jax.Array


def solve_flow(
    denoise_fn: DenoiseFn, x: jax.Array, start: float, stop: float, *, rtol: float = 1e-5, atol: float = 1e-5
) -> Solved:
    """Follow the ODE from noise level ``start`` to ``stop``, up or down.

    Args:
      denoise_fn: D(x, sigma) with sigma a scalar.
      x: [B, H, W, C] at the first level; its type is what is computed in.
      start, stop: positive noise levels.
      rtol, atol: error of a step, as a root mean square over the pixels of the image that is worst off.

    Raises:
      UserError: levels that are not positive, or equal.
    """
    return _solve(lambda t, y: y - denoise_fn(y, jnp.exp(t)), x, start, stop, rtol, atol)


def reference_samples(
    denoise_fn: DenoiseFn, latents: jax.Array, start: float, stop: float, *, rtol: float = 1e-5, atol: float = 1e-5
) -> Solved:
    """What every deterministic sampler approximates: the ODE from start * latents to ``stop``, then D there.

    Args, raises: as :func:`solve_flow`, with standard normal latents.
    """
    solved = solve_flow(denoise_fn, latents * float(start), start, stop, rtol=rtol, atol=atol)
    return solved._replace(x=denoise_fn(solved.x, jnp.asarray(stop, solved.x.dtype)))


def log_likelihood(
    denoise_fn: DenoiseFn,
    x: jax.Array,
    sigma_min: float,
    sigma_max: float,
    trace_fn: TraceFn,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> Solved:
    """ln p(x) in nats, [B], where p is the density at ``sigma_min`` that the ODE makes of N(0, sigma_max^2 I).

    ln p(x) = ln N(x(sigma_max); 0, sigma_max^2 I) + integral over ln sigma of (dim - trace dD/dx)
    (Song et al., arXiv 2011.13456, equation 39, for this ODE).

    Args:
      denoise_fn: D(x, sigma) with sigma a scalar.
      x: [B, H, W, C].
      sigma_min, sigma_max: positive noise levels; the first should be well below the finest detail.
      trace_fn: :func:`hutchinson` or :func:`exact_trace`.
      rtol, atol: as in :func:`solve_flow`, for x and for ln p.

    Raises:
      UserError: levels that are not positive, or do not rise.
    """
    check_range(sigma_min, sigma_max)
    x = jnp.asarray(x)
    dim = x[0].size

    def slope(t: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        D, trace = trace_fn(lambda y: denoise_fn(y, jnp.exp(t)), state[0])
        return state[0] - D, dim - trace

    solved = _solve(slope, (x, jnp.zeros(len(x), x.dtype)), sigma_min, sigma_max, rtol, atol)
    end, volume = solved.x
    squares = jnp.sum((end / sigma_max) ** 2, axis=tuple(range(1, x.ndim)))
    return solved._replace(x=volume - squares / 2 - dim * (jnp.log(sigma_max) + jnp.log(2 * jnp.pi) / 2))


def hutchinson(probe: jax.Array) -> TraceFn:
    """trace J ~ e^T J e for a probe e of x's shape, such as random signs: right on average (Hutchinson 1990)."""

    def trace(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        D, pushed = jax.jvp(f, (x,), (probe.astype(x.dtype),))
        return D, jnp.sum(probe * pushed, axis=tuple(range(1, x.ndim)))

    return trace


def exact_trace(f: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The trace itself, at the cost of one derivative per pixel and channel: for small images."""
    D, push = jax.linearize(f, x)
    dim = x[0].size

    def diagonal(i: jax.Array) -> jax.Array:
        unit = jax.nn.one_hot(i, dim, dtype=x.dtype).reshape(x.shape[1:])
        return push(jnp.broadcast_to(unit, x.shape)).reshape(len(x), dim)[:, i]

    return D, jnp.sum(jax.lax.map(diagonal, jnp.arange(dim)), axis=0)


def bits_per_dim(log_p: jax.Array, dim: int, bin_width: float = 1 / 127.5) -> jax.Array:
    """-log2 of the probability of a bin, per pixel and channel: -log2(p) / dim - log2(bin_width).

    The bin is that of uniform dequantisation: an 8-bit value k becomes (k - 1/2 + u) / 127.5 - 1 with u uniform in [0, 1).
    """
    return -log_p / (dim * jnp.log(2.0)) - jnp.log2(bin_width)


def _solve(slope: Any, y: Any, start: float, stop: float, rtol: float, atol: float) -> Solved:
    if not (0 < start < float("inf") and 0 < stop < float("inf")) or start == stop:
        raise UserError(f"The ODE goes from one positive noise level to another, and not from {start} to {stop}.")
    y = jax.tree.map(jnp.asarray, y)
    dtype = jax.tree.leaves(y)[0].dtype

    def worst_image(scaled: Any) -> jax.Array:
        """An image's company should not decide how well it is done."""
        each = [jnp.mean(leaf.reshape(len(leaf), -1) ** 2, axis=1) for leaf in jax.tree.leaves(scaled)]
        return jnp.sqrt(jnp.max(jnp.stack(each)))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, _: slope(t, y)),
        diffrax.Dopri8(),
        t0=jnp.log(jnp.asarray(start, dtype)),
        t1=jnp.log(jnp.asarray(stop, dtype)),
        # Not diffrax's own guess, which is NaN where D is, and a NaN gets no smaller.
        dt0=FIRST_STEP if stop > start else -FIRST_STEP,
        y0=y,
        stepsize_controller=diffrax.PIDController(
            rtol=rtol, atol=atol, norm=worst_image, dtmin=SMALLEST_STEP, force_dtmin=False
        ),
        max_steps=MAX_STEPS,
        throw=False,
    )
    assert solution.ys is not None
    end = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    return Solved(end, solution.stats["num_steps"], solution.result == diffrax.RESULTS.successful)
