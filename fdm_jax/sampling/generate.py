"""Seeds in, images out: a network, a family and a solver as one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.denoiser import DenoiseFn, make_denoise_fn
from fdm_jax.devices import checked, fetch, in_batches, put, replicated, sent_ahead, sharded
from fdm_jax.errors import UserError, nearest
from fdm_jax.families import Family
from fdm_jax.sampling.edm import Churn
from fdm_jax.sampling.grids import GRIDS, edm_sigmas, sampling_range
from fdm_jax.sampling.guidance import Guidance, with_and_without_class
from fdm_jax.sampling.linear import integrate
from fdm_jax.sampling.seeds import as_seeds, churn_noise, latents, to_uint8
from fdm_jax.sampling.solvers import SOLVERS, make_calls

# (variables, labels int [B]) -> D(x, sigma)
ModelDenoiser = Callable[[Any, jax.Array], DenoiseFn]
GenerateFn = Callable[[Any, jax.Array, jax.Array], jax.Array]


def make_model_denoiser(
    network: nn.Module,
    family: Family,
    num_classes: int,
    guidance: Guidance | None = None,
    guide: tuple[nn.Module, Family] | None = None,
    *,
    exact: bool = False,
) -> ModelDenoiser:
    """Build denoiser(variables, labels) -> D(x, sigma), guided if so wished.

    Args:
      network, family, num_classes, guidance, guide: as for :func:`make_generate_fn`.
      exact: for adaptive solvers, compute in float32 with all of its digits what networks and devices otherwise compute
        in bfloat16 or TF32.  Such a solver takes rounding for error: along a bfloat16 network, at a tolerance of 1e-5, it
        takes 25 to 55 times as many steps.

    Raises:
      UserError: guidance by classes of a model that has none, or a guide without guidance.
    """
    if guidance is None and guide is not None:
        raise UserError("A guide needs guidance, which says how strongly to guide away from it.")
    if guidance is not None and guide is None and not num_classes:
        raise UserError("Classifier-free guidance needs a model with classes, and this one has none.")

    apply_of = _all_digits if exact else lambda network: network.apply

    def model_denoiser(variables: Any, labels: jax.Array) -> DenoiseFn:
        class_labels = jax.nn.one_hot(labels, num_classes) if num_classes else None
        own, others = variables if guide is not None else (variables, {})
        labelled = make_denoise_fn(family, functools.partial(apply_of(network), own))

        def denoise(x: jax.Array, sigma: jax.Array, /) -> jax.Array:
            return labelled(x, sigma, class_labels)

        if guidance is None:
            return denoise
        if guide is not None:
            other_network, other_family = guide
            other = make_denoise_fn(other_family, functools.partial(apply_of(other_network), others))
            return guidance(denoise, lambda x, sigma: (denoise(x, sigma), other(x, sigma, class_labels)))
        assert class_labels is not None
        return guidance(denoise, with_and_without_class(labelled, class_labels))

    return model_denoiser


def _all_digits(network: nn.Module) -> Callable[..., Any]:
    network = network.clone(dtype=jnp.float32, attention="auto")  # a kernel chosen for attention may take bfloat16 only

    def apply(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return network.apply(*args)

    return apply


def levels_of(
    grid: str | Sequence[float], family: Family, sigma_min: float, sigma_max: float, rho: float, *, clip: bool = True
) -> Callable[[int], np.ndarray]:
    """A grid as a function from its number of points to noise levels, with 0 after them; see :func:`make_generate_fn`."""
    span = sampling_range(family, sigma_min, sigma_max) if clip else (sigma_min, sigma_max)

    def levels(points: int) -> np.ndarray:
        if not isinstance(grid, str):
            return np.asarray(grid, np.float64)
        if grid not in GRIDS:
            raise UserError(f"There is no grid {grid!r}: {nearest(grid, GRIDS)}")
        return edm_sigmas(points, *span, rho) if grid == "edm" else GRIDS[grid](points, *span)

    return levels


def make_generate_fn(
    network: nn.Module,
    family: Family,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    steps: int,
    solver: str = "heun",
    grid: str | Sequence[float] = "edm",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    clip: bool = True,
    churn: Churn | None = None,
    guidance: Guidance | None = None,
    guide: tuple[nn.Module, Family] | None = None,
) -> GenerateFn:
    """Build generate(variables, seeds, labels) -> images [B, H, W, C], about [-1, 1]; pure and jittable.

    Args:
      network, family, image_shape, num_classes: of the model.
      steps: of the solver.
      solver: a key of :data:`~fdm_jax.sampling.solvers.SOLVERS`.
      grid: a key of :data:`~fdm_jax.sampling.grids.GRIDS`, or the noise levels themselves, falling and with 0 at the end.
      sigma_min, sigma_max: of a named grid.
      rho: of the grid ``edm``.
      clip: whether the family's own range bounds that of a named grid; noise levels given as such stay as they are.
      churn: for heun and euler.
      guidance: how strongly to guide, classifier-free unless there is a guide; None for not at all.
      guide: network and family of a second, worse model to guide away from (autoguidance). ``variables`` of the result
        is then a pair, of the model and of the guide.

    Raises:
      UserError: see :func:`~fdm_jax.sampling.solvers.make_calls`.

    The result takes variables as ``network.apply`` does, seeds uint32 [B] and labels int32 [B], where -1 stands
    for "no class"; labels are ignored by unconditional models.
    """
    levels = levels_of(grid, family, sigma_min, sigma_max, rho, clip=clip)
    model_denoiser = make_model_denoiser(network, family, num_classes, guidance, guide)
    calls = make_calls(solver, steps, levels, churn)
    start = levels(SOLVERS[solver].points(steps))[0]

    def generate(variables: Any, seeds: jax.Array, labels: jax.Array) -> jax.Array:
        noise = latents(seeds, image_shape)
        draw = functools.partial(churn_noise, seeds, shape=image_shape)
        return integrate(model_denoiser(variables, labels), noise, start, calls, draw)

    return generate


class NotFinite(UserError):
    """Samples that are no numbers: 8-bit images cannot say so, and would be black."""


def check_finite(seeds: np.ndarray, finite: np.ndarray) -> None:
    """Raise NotFinite, naming them, if the images of some seeds [N] are not ``finite``, bool [N]."""
    if not finite.all():
        bad = seeds[~finite]
        raise NotFinite(
            f"The images of {len(bad)} of {len(seeds)} seeds ({', '.join(map(str, bad[:5]))}{', ...' if len(bad) > 5 else ''})"
            " are not finite numbers: sample with more steps, another solver or less guidance, or from an earlier "
            "checkpoint if the weights are the cause."
        )


class BatchedGenerator:
    """Runs a generate function on all devices in batches of one size, so that it is compiled once.

    Args:
      generate: from :func:`make_generate_fn`.
      mesh: one axis, over which the rows of a batch are dealt; every process of it calls, and gets all images.
      batch_size: rounded up to a multiple of the devices.
      quantise: whether images are uint8; else they are as ``generate`` gives them.
      check: of the program, see :func:`~fdm_jax.devices.checked`.

    Raises:
      UserError: the batch size is not 1 or more.
    """

    def __init__(
        self,
        generate: GenerateFn,
        mesh: jax.sharding.Mesh,
        batch_size: int,
        quantise: bool = True,
        check: Callable[[jax.stages.Compiled], None] | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"The batch size must be 1 or more, and is {batch_size}.")
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._rows, self._whole = rows, whole = sharded(mesh), replicated(mesh)
        self._mesh, self._quantise = mesh, quantise

        def finished(variables: Any, seeds: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = generate(variables, seeds, labels)
            return to_uint8(x) if quantise else x, jnp.isfinite(x).all(axis=(1, 2, 3))

        self._generate = jax.jit(finished, in_shardings=(whole, rows, rows), out_shardings=rows)
        self._run = checked(self._generate, check)

    def __call__(self, variables: Any, seeds: np.ndarray, labels: np.ndarray) -> Iterator[np.ndarray]:
        """Yield images [n, H, W, C] of seeds [N] and labels [N], batch by batch; the last n may be smaller.

        Raises:
          UserError: a seed outside 0 ... 2^32 - 1, or not as many labels as seeds.
          NotFinite: images that were to be uint8 are not finite.
          Exception: what the check of the program raises.
        """
        seeds, labels = as_seeds(seeds), np.asarray(labels, np.int32)
        if seeds.shape != labels.shape:
            raise UserError(f"Every seed needs a label, and there are {len(seeds)} seeds and {len(labels)} labels.")
        variables = put(variables, self._whole)
        sent = (
            (part[0][:count], self._run(variables, *put(part, self._rows)))
            for count, part in in_batches(self.batch_size, seeds, labels)
        )
        for new, made in sent_ahead(sent, self._mesh):
            images, finite = (fetch(a)[: len(new)] for a in made)
            if self._quantise:
                check_finite(new, finite)
            yield images
