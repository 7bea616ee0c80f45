"""Evaluation while a run trains: held-out denoising error, and generated samples against statistics of real images."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
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
from fdm_jax.sampling.generate import BatchedGenerator, NotFinite
from fdm_jax.training.agreement import all_or_none, check_data
from fdm_jax.whole_files import place

log = logging.getLogger(__name__)

ShouldStop = Callable[[], bool]  # whether to break off

LEVELS = 4  # noise levels per image of the one figure
SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the curves


class _BrokenOff(Exception):
    """An evaluation was told to stop in the middle."""


class Evaluator:
    """What ``config.eval`` asks for, compiled once; everything random is the same at every call.

    Args:
      experiment: of the run.
      mesh: whose devices work on it.

    Attributes:
      compiled: whether a call has come to its end, so that the next one begins at once.

    Raises:
      UserError: held-out data or statistics that are missing or do not fit.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh):
        config = experiment.config.eval
        self.compiled = False
        self._measures: list[Callable[[Any, ShouldStop], dict[str, float]]] = []
        if config.held_out_split:
            self._measures.append(_held_out(experiment, mesh))
        if config.ref:
            self._measures.append(_frechet(experiment, mesh))
        if not self._measures:
            raise UserError(
                "eval.every_images is set, and there is nothing to evaluate: set eval.held_out_split, eval.ref, or both."
            )

    def __call__(self, variables: Any, stop: ShouldStop = lambda: False) -> dict[str, float] | None:
        """Figures of the averaged weights {"params": ..., ...constants}; None if ``stop`` said so in the middle."""
        figures: dict[str, float] = {}
        try:
            for measure in self._measures:
                figures |= measure(variables, stop)
        except _BrokenOff:
            return None
        self.compiled = True
        return figures


@contextlib.contextmanager
def _counting(total: int, stop: ShouldStop) -> Iterator[Callable[[int], None]]:
    """What to call with the number of images of every batch that is done: shows how it goes, and stops when asked to.

    Raises:
      _BrokenOff: from the call, if ``stop`` said so.
    """

    def count(images: int) -> None:
        progress.more(images, "evaluating")
        if stop():
            raise _BrokenOff

    quiet = jax.process_index() > 0
    with contextlib.closing(Progress(total, 0, quiet=quiet, seconds=LINE_SECONDS, last=False)) as progress:
        yield count


def _held_out(experiment: Experiment, mesh: Mesh) -> Callable[[Any, ShouldStop], dict[str, float]]:
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
    denoising = DenoisingError(
        denoise, images, batch["label"], batch_size=size, rows=sharded(mesh), check=program_check()
    )

    def measure(variables: Any, stop: ShouldStop) -> dict[str, float]:
        with _counting(len(images) * (LEVELS + len(SIGMAS)), stop) as count:
            figures = {"val/error": denoising.mean(variables, levels=LEVELS, on_batch=count)}
            by_sigma = denoising.by_sigma(variables, SIGMAS, on_batch=count)
        return figures | {f"val/error@{sigma:g}": float(value) for sigma, value in zip(SIGMAS, by_sigma, strict=True)}

    return measure


def _frechet(experiment: Experiment, mesh: Mesh) -> Callable[[Any, ShouldStop], dict[str, float]]:
    config = experiment.config.eval
    with all_or_none("Another process cannot measure samples (eval.ref), and says why."):
        weights = place(config.weights) if config.weights else None
        reference, extractor = open_with_extractor(place(config.ref), config.extractor, weights, experiment.image_shape)
    size, check = min(config.batch_size, config.num_images), program_check()
    generator = BatchedGenerator(experiment.generate_fn(), mesh, size, check=check)
    maker = FeatureMaker(extractor, mesh, generator.batch_size, check)
    name = "eval/fid" if extractor.kind == "inception" else "eval/frechet_distance"

    def measure(variables: Any, stop: ShouldStop) -> dict[str, float]:
        seeds, counted = np.arange(config.num_images, dtype=np.uint32), Moments(extractor.width)
        labels = experiment.choose_labels(None, seeds)
        with _counting(len(seeds), stop) as count:
            try:
                for images in generator(variables, seeds, labels):
                    counted.add(maker(images)[0])
                    count(len(images))
            except NotFinite as error:
                log.warning("No %s: %s", name, error)
                return {name: float("nan")}
        return {name: frechet_distance(*counted.result(), reference.mu, reference.sigma)}

    return measure
