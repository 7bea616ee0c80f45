"""Evaluation while a run trains: held-out denoising error, and generated samples against statistics of real images."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fdm_jax.devices import sharded
from fdm_jax.errors import UserError
from fdm_jax.evaluation.denoising import DenoisingError
from fdm_jax.evaluation.extractors import FeatureMaker
from fdm_jax.evaluation.frechet import frechet_distance
from fdm_jax.evaluation.moments import Moments
from fdm_jax.evaluation.references import open_with_extractor
from fdm_jax.experiment import Experiment, open_data
from fdm_jax.host_memory import program_check
from fdm_jax.progress import LINE_SECONDS, Progress
from fdm_jax.sampling import seeds as draws
from fdm_jax.sampling.generate import BatchedGenerator, NotFinite
from fdm_jax.training.agreement import all_or_none, check_data
from fdm_jax.whole_files import place

log = logging.getLogger(__name__)

SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the curves


class Evaluator:
    """What ``config.eval`` asks for, compiled once; everything random is the same at every call.

    Args:
      experiment: of the run.
      mesh: whose devices work on it.

    Raises:
      UserError: held-out data or statistics that are missing or do not fit.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        config = experiment.config.eval
        self._error: DenoisingError | None = None
        self._samples: Callable[[Any, Callable[[], bool]], dict[str, float] | None] | None = None
        if config.held_out_split:
            self._error = _held_out(experiment, mesh)
        if config.ref:
            self._samples = _frechet(experiment, mesh)
        if self._error is None and self._samples is None:
            raise UserError(
                "eval.every_images is set, and there is nothing to evaluate: set eval.held_out_split, eval.ref, or both."
            )

    def __call__(self, variables: Any, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Figures of the averaged weights {"params": ..., ...constants}; None if ``stop`` said so in the middle."""
        figures = {}
        if self._error is not None:
            figures["val/error"] = self._error.mean(variables)
            by_sigma = self._error.by_sigma(variables, SIGMAS)
            figures |= {f"val/error@{sigma:g}": float(value) for sigma, value in zip(SIGMAS, by_sigma, strict=True)}
        if self._samples is not None:
            measured = self._samples(variables, stop)
            if measured is None:
                return None
            figures |= measured
        return figures


def _held_out(experiment: Experiment, mesh: Mesh) -> DenoisingError:
    config, shape = experiment.config.eval, experiment.image_shape
    with all_or_none("Another process cannot have the held-out images, and says why."):
        try:
            source = open_data(experiment.config, config.held_out_split, config.held_out_source)
        except UserError as error:
            raise UserError(
                f"The held-out images (eval.held_out_split={config.held_out_split}) cannot be had: {error} "
                "Without them: --config.eval.held_out_split=''."
            ) from error
        spec = source.spec
        found = (spec.resolution, spec.resolution, spec.channels)
        if found != shape:
            raise UserError(f"The held-out images of {spec.name} are {found}, and the run's are {shape}.")
    check_data(source)
    batch = source.read(np.arange(min(len(source), config.held_out_images)))
    model_denoiser = experiment.model_denoiser()

    def denoise(variables: Any, x: jax.Array, sigma: jax.Array, labels: jax.Array) -> jax.Array:
        return model_denoiser(variables, labels)(x, sigma)

    images = batch["image"] / np.float32(127.5) - 1
    # No more than a step holds at a time, gradients and all.
    train = experiment.config.train
    size = -(-min(256, 4 * len(images), train.batch_size // train.accumulation) // mesh.size) * mesh.size
    return DenoisingError(denoise, images, batch["label"], batch_size=size, rows=sharded(mesh), check=program_check())


def _frechet(experiment: Experiment, mesh: Mesh) -> Callable[[Any, Callable[[], bool]], dict[str, float] | None]:
    config = experiment.config.eval
    with all_or_none("Another process cannot measure samples (eval.ref), and says why."):
        weights = place(config.weights) if config.weights else None
        reference, extractor = open_with_extractor(place(config.ref), config.extractor, weights, experiment.image_shape)
    size, check = min(config.batch_size, config.num_images), program_check()
    generator = BatchedGenerator(experiment.generate_fn(), mesh, size, check=check)
    maker = FeatureMaker(extractor, mesh, generator.batch_size, check)
    name = "eval/fid" if extractor.kind == "inception" else "eval/frechet_distance"

    def measure(variables: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        seeds, counted = np.arange(config.num_images, dtype=np.uint32), Moments(extractor.width)
        labels = np.asarray(draws.labels(jnp.asarray(seeds), experiment.num_classes))
        with contextlib.closing(
            Progress(config.num_images, 0, quiet=jax.process_index() > 0, seconds=LINE_SECONDS)
        ) as progress:
            try:
                for images in generator(variables, seeds, labels):
                    counted.add(maker(images)[0])
                    progress.more(len(images), "evaluating")
                    if stop():
                        return None
            except NotFinite as error:
                log.warning("No %s: %s", name, error)
                return {name: float("nan")}
        return {name: frechet_distance(*counted.result(), reference.mu, reference.sigma)}

    return measure
