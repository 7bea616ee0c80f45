"""The solvers by name, and what is known of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from fdm_jax.errors import UserError, nearest
from fdm_jax.sampling.dpm import multistep_calls, singlestep_calls, singlestep_orders
from fdm_jax.sampling.edm import Churn, edm_calls
from fdm_jax.sampling.grids import check_steps
from fdm_jax.sampling.linear import Call
from fdm_jax.sampling.multistep import deis_calls, ipndm_calls, unipc_calls
from fdm_jax.sampling.stochastic import ancestral_calls, sde_dpm_calls


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver, counted in steps.

    Attributes:
      order: of convergence for smooth denoisers, as the step shrinks; for stochastic solvers that of their mean.
      cost: denoiser calls of so many steps, in words.
      source: where it is from.
      calls: its table for a grid [N + 1] and a number of steps.
      points: levels of the grid, without the 0 at its end, that so many steps need.
      steps_of: the steps that so many denoiser calls (NFE) allow.
      stochastic: whether it draws noise.
      min_steps: fewer make no sense.
    """

    order: int
    cost: str
    source: str
    calls: Callable[[np.ndarray, int], list[Call]]
    points: Callable[[int], int] = lambda steps: steps
    steps_of: Callable[[int], int] = lambda nfe: nfe
    stochastic: bool = False
    min_steps: int = 1


def _multistep(build: Callable[[np.ndarray, int], list[Call]], order: int) -> Callable[[np.ndarray, int], list[Call]]:
    return lambda sigmas, steps: build(sigmas, order)


def _singlestep(order: int) -> Solver:
    """Steps of one order, and the denoised image at the end."""
    return Solver(
        order, f"{order} steps - {order - 1}" if order > 1 else "steps", "arXiv 2211.01095",
        lambda sigmas, steps: singlestep_calls(sigmas, [order] * (len(sigmas) - 1)),
        steps_of=lambda nfe: (nfe - 1) // order + 1, min_steps=2,
    )  # fmt: skip


SOLVERS: dict[str, Solver] = {
    "heun": Solver(
        2, "2 steps - 1", "arXiv 2206.00364, algorithm 1; 2 with churn", lambda sigmas, steps: edm_calls(sigmas),
        steps_of=lambda nfe: (nfe + 1) // 2,
    ),
    "euler": Solver(
        1, "steps", "DDIM, arXiv 2010.02502", lambda sigmas, steps: edm_calls(sigmas, heun=False)
    ),
    # The original's run: evaluations are the steps, orders follow; 1 evaluation is the denoised image at the end.
    "dpmpp": Solver(
        3, "steps", "DPM-Solver++ as the original runs it, orders 3, ..., 3 and what is left",
        lambda sigmas, steps: singlestep_calls(sigmas, [*singlestep_orders(steps - 1), 1]),
        points=lambda steps: len(singlestep_orders(steps - 1)) + 1, min_steps=2,
    ),
    "dpmpp-2s": _singlestep(2),
    "dpmpp-3s": _singlestep(3),
    "dpmpp-2m": Solver(2, "steps", "arXiv 2211.01095", _multistep(multistep_calls, 2), min_steps=2),
    "dpmpp-3m": Solver(3, "steps", "arXiv 2211.01095", _multistep(multistep_calls, 3), min_steps=2),
    "unipc-1": Solver(2, "steps", "UniPC-1, arXiv 2302.04867", _multistep(unipc_calls, 1), min_steps=2),
    "unipc-2": Solver(3, "steps", "UniPC-2, arXiv 2302.04867", _multistep(unipc_calls, 2), min_steps=2),
    "unipc-3": Solver(4, "steps", "UniPC-3, arXiv 2302.04867", _multistep(unipc_calls, 3), min_steps=2),
    "deis-2": Solver(2, "steps", "DEIS tAB-1, arXiv 2204.13902", _multistep(deis_calls, 2), min_steps=2),
    "deis-3": Solver(3, "steps", "DEIS tAB-2, arXiv 2204.13902", _multistep(deis_calls, 3), min_steps=2),
    "ipndm": Solver(
        2, "steps", "iPNDM-4, arXiv 2204.13902; order 4 where steps are even",
        lambda sigmas, steps: ipndm_calls(sigmas), min_steps=2,
    ),
    "ancestral": Solver(
        1, "steps", "DDPM's posterior, arXiv 2006.11239", lambda sigmas, steps: ancestral_calls(sigmas), stochastic=True
    ),
    "sde-dpmpp-2m": Solver(
        2, "steps", "arXiv 2211.01095", lambda sigmas, steps: sde_dpm_calls(sigmas), stochastic=True, min_steps=2
    ),
}  # fmt: skip


def make_calls(
    name: str, steps: int, grid: Callable[[int], np.ndarray] | Sequence[float], churn: Churn | None = None
) -> list[Call]:
    """The table of a solver.

    Args:
      name: a key of :data:`SOLVERS`.
      steps: of the solver.
      grid: gives so many levels and a 0 after them; or the levels themselves, whose number then has to fit.
      churn: for heun and euler.

    Raises:
      UserError: an unknown solver, too few or too many steps, churn for a solver that has none, or a grid that does not fit.
    """
    if name not in SOLVERS:
        raise UserError(f"There is no solver {name!r}: {nearest(name, SOLVERS)}")
    solver = SOLVERS[name]
    if steps < solver.min_steps:
        raise UserError(
            f"The solver {name} takes {solver.min_steps} step{'s' * (solver.min_steps > 1)} or more, not {steps}."
        )
    check_steps(steps)
    points = solver.points(steps)
    sigmas = grid(points) if callable(grid) else np.asarray(grid, np.float64)
    if len(sigmas) != points + 1:
        raise UserError(
            f"{steps} steps of {name} go through {points} noise levels and 0, and {len(sigmas) - 1} are given."
        )
    if churn is not None and churn.S_churn > 0:
        if name not in ("heun", "euler"):
            raise UserError(f"Churn belongs to the solvers heun and euler, not to {name}.")
        return edm_calls(sigmas, churn, heun=name == "heun")
    return solver.calls(sigmas, steps)
