"""The training loop: the shell that feeds the pure step, and keeps what it gives."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fdm_jax import pictures
from fdm_jax.data.pipeline import Batches, make_batches
from fdm_jax.data.sources import Source
from fdm_jax.defaults import to_json
from fdm_jax.devices import make_mesh, put, replicated
from fdm_jax.errors import RestartNeeded, UserError, lost_another, memory_full
from fdm_jax.experiment import Experiment
from fdm_jax.host_memory import program_check
from fdm_jax.progress import Progress
from fdm_jax.sampling.generate import BatchedGenerator, NotFinite
from fdm_jax.storage_errors import file_trouble
from fdm_jax.training.agreement import all_or_none, check_config, check_data, check_shared
from fdm_jax.training.checkpoints import Checkpoints
from fdm_jax.training.evaluating import Evaluator
from fdm_jax.training.locking import locked
from fdm_jax.training.metering import Meter
from fdm_jax.training.metrics import is_evaluation
from fdm_jax.training.starting import (
    check_configuration,
    check_workdir,
    fresh_state,
    initial_state,
    list_parameters,
    weights_of_another_run,
)
from fdm_jax.training.stopping import Stop, stop_requests
from fdm_jax.training.watchdog import of_process
from fdm_jax.training.writers import Writers, in_words, write_curves
from fdm_jax.whole_files import write_text

# Programs sent to the devices before the metrics of the first are waited for: keeps them busy, bounds the queue.
PROGRAMS_IN_FLIGHT = 4

# Seconds that a process that ends before the others gives a checkpoint: on CPUs they take it for lost after 30.
PATIENCE = 15

# Where steps are never sent as one program: to launch one costs a CPU little, and in a program's loop its gradients of
# convolutions take 20 to 45 times as long (see fdm_jax.training.step).
ONE_BY_ONE = ("cpu",)


def steps_together(experiment: Experiment) -> int:
    """How many steps a run sends to its devices as one program."""
    return 1 if jax.default_backend() in ONE_BY_ONE else experiment.config.train.steps_at_once


def check(experiment: Experiment) -> None:
    """Raise the UserErrors of :func:`train` that need no workdir; nothing is compiled, nothing is written."""
    experiment.check_devices(jax.device_count())
    experiment.sample_grid()
    mesh = make_mesh()
    parallel = experiment.parallelised(mesh)
    fresh_state(experiment.network, experiment.spec, experiment.image_shape, parallel.state_sharding)
    _evaluator(experiment, mesh)
    weights_of_another_run(experiment)


def _evaluator(experiment: Experiment, mesh: jax.sharding.Mesh) -> Evaluator | None:
    return Evaluator(experiment, mesh) if experiment.config.eval.every_images else None


def train(
    experiment: Experiment, source: Source, workdir: Path, watch: Callable[[int, Any], None] | None = None
) -> bool:
    """Train, or go on training, in a workdir.

    Writes ``config.json``, ``parameters.txt``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``samples/*.png``,
    ``curves.png`` and, if the run evaluates, ``held_out.png``.  The same call again continues the run from its newest
    checkpoint, bit for bit.

    Args:
      experiment: what to train.
      source: the data.
      workdir: made if it is not there.
      watch: for profilers; called each time that steps were sent to the devices, with their number so far and the state
        after them, which is ready when they are done.

    Several processes call it alike, with a workdir that all of them see.

    Returns:
      True if the run is complete; False if a signal (SIGTERM, Ctrl-C) ended it early, saved.

    Raises:
      RestartNeeded: one of several processes was told to end; the run is saved.
      UserError: the workdir is in use, or belongs to another configuration or to something else; the batch cannot be
        dealt to the devices; or the gradients were not finite too often in a row.
    """
    experiment.check_devices(jax.device_count())
    with locked(workdir, hold=jax.process_index() == 0):
        check_shared(workdir)
        return _Run(experiment, source, workdir).train(watch)


def _check_gradients(config: Any, checkpoints: Checkpoints, metrics: dict[str, float]) -> None:
    if metrics["bad_steps"] >= config.train.max_bad_steps:
        raise UserError(
            f"The gradients were not finite in {int(metrics['bad_steps'])} steps in a row: train.learning_rate "
            f"({config.train.learning_rate}) may be too high; the newest checkpoint is of step "
            f"{max(checkpoints.steps(), default=0)}."
        )


class _Run:
    """One start of a run."""

    def __init__(self, experiment: Experiment, source: Source, workdir: Path):
        self.began = time.monotonic()
        check_data(source)
        check_config(experiment.config.to_dict())
        self.experiment, self.workdir, self.config = experiment, workdir, experiment.config
        self.batch_size = experiment.spec.batch_size
        self.main = jax.process_index() == 0
        self.mesh = make_mesh()
        self.parallel = experiment.parallelised(self.mesh)
        self.total_steps = -(-self.config.train.images // self.batch_size)
        self.together = steps_together(experiment)
        self.sample_grid = experiment.sample_grid()
        self.checkpoint_steps = self._steps(self.config.checkpoint.every_images)
        keep = round(self.config.checkpoint.keep_every_images / self.batch_size / self.checkpoint_steps)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep_latest=self.config.checkpoint.keep_latest,
            keep_every_steps=max(keep, 1) * self.checkpoint_steps,
        )
        check_configuration(self.checkpoints, experiment, workdir)
        self.evaluator = _evaluator(experiment, self.mesh)
        self.batches: Batches = make_batches(
            source,
            batch_size=self.batch_size,
            seed=self.config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self.config.data.threads,
            num_workers=self.config.data.workers,
        )
        # Batches on the devices, not used yet: how many together, and they.
        self.placed: collections.deque[tuple[int, Any]] = collections.deque()
        self.check = program_check() if self.config.parallel != "pmap" else None  # of the first program
        self.generator: BatchedGenerator | None = None
        self.log_steps = self._steps(self.config.log.every_images)
        self.eval_steps, self.sample_steps = (
            self._steps(section.every_images) if section.every_images else None
            for section in (self.config.eval, self.config.samples)
        )

    def _steps(self, images: int) -> int:
        """An interval in images as the nearest number of whole programs, in steps."""
        together = self.config.train.steps_at_once  # whatever the platform, so that a run may move
        return max(round(images / self.batch_size / together), 1) * together

    def train(self, watch: Callable[[int, Any], None] | None = None) -> bool:
        self._begin()
        with stop_requests() as stop, self._closing() as closing:
            closing.enter_context(self.watchdog)  # the last to end
            closing.push(self._close_checkpoints)
            for each in (self.batches, self.progress, self.writers):
                if each is not None:
                    closing.callback(each.close)
            stopping, programs = not self._make_up(stop), 0
            if self.step < self.total_steps and not stopping:
                self.progress.say("Compiling the train step: the first time, minutes for a large network.")
            while self.step < self.total_steps and not stopping:
                self._send()
                programs += 1
                if programs == 1:
                    self.meter.compiled()
                    self.progress.say(f"First step done {time.monotonic() - self.began:.1f} s after the start.")
                self.meter.wait(PROGRAMS_IN_FLIGHT)
                self.progress.advance(self.nimg)
                if watch is not None:
                    watch(self.step, self.state)
                stopping = stop.after(programs)
                if self._due(self.log_steps) or stopping:
                    self._report()
                # First of all: what ends an evaluation or a picture, such as memory that it does not get, costs no steps,
                # and the next start finds that it is still to be done.
                if stopping or self._due(self.checkpoint_steps) or self._due(self.eval_steps):
                    self._save()
                if self._due(self.eval_steps) and not stopping:
                    stopping = not self._evaluate(stop)
                    if stopping and self.meter.unreported:
                        self._report()
                if self._due(self.sample_steps) and not stopping:
                    self._sample()
            self.watchdog.at("a checkpoint to be written")
            self.checkpoints.wait()
            if self.writers is not None:
                write_curves(self.workdir, self.writers.rows)
            # Stopped after the last step, what belongs to the end is still to be done.
            belongs = self._due(self.eval_steps) or self._due(self.sample_steps)
            complete = self.step >= self.total_steps and not (stopping and belongs)
            if not complete:
                sentence = f"Stopped by {stop.reason} at step {self.step:,}, saved; the same command goes on from here."
                if stop.preempted:
                    raise RestartNeeded(sentence)
                self.progress.say(sentence)
        return complete

    def _begin(self) -> None:
        """Everything that begins at the step of the newest checkpoint."""
        if not self.checkpoints.steps():
            with all_or_none(f"{self.workdir} cannot be used by the first process, which says why."):
                if self.main:  # before it writes what others could take for a stranger's
                    check_workdir(self.workdir)
        state, position = initial_state(self.experiment, self.parallel.state_sharding, self.checkpoints)
        if position is not None:
            self.batches.set_state(position)
        if self.main:  # not before it is sure that the run goes on with it
            write_text(self.workdir / "config.json", to_json(self.config))
            if position is None:  # after config.json, which says that the workdir is a run's
                list_parameters(state.params, self.workdir)
        self.step = int(state.step)
        self.state = self.parallel.put_state(state)  # on the devices, in the form that the step takes
        self.writers = Writers(self.workdir, self.step, self.nimg) if self.main else None
        self.seconds_before = 0.0
        if self.writers is not None:
            self.seconds_before = max((row.get("seconds") or 0.0 for row in self.writers.rows), default=0.0)
        self.progress = Progress(self.total_steps * self.batch_size, self.nimg, quiet=not self.main)
        self.watchdog = of_process(self.progress)
        if self.step:
            self.progress.say(f"Going on from step {self.step:,} ({self.nimg:,} images).")
        # No method: a cycle would keep the state on the devices for a while after the run.
        check = functools.partial(_check_gradients, self.config, self.checkpoints)
        self.meter = Meter(self.batch_size, self.parallel.get_metrics, check)

    @property
    def nimg(self) -> int:
        """Images seen so far."""
        return self.step * self.batch_size

    def _seconds(self) -> float:
        """Of all starts of the run."""
        return self.seconds_before + time.monotonic() - self.began

    def _due(self, every: int | None) -> bool:
        """Whether what is done every so many steps, and at the end, is to be done now."""
        return every is not None and (self.step % every == 0 or self.step == self.total_steps)

    def _report(self) -> None:
        """A row of the steps since the last one."""
        row = {"step": self.step, "nimg": self.nimg, **self.meter.row(), "seconds": self._seconds()}
        self.watchdog.at("figures to be written")
        if self.writers is not None:
            self.writers.scalars(row)
        self.progress.report(row.get("img_per_s", 0.0), f"loss {row['loss']:<8.4g}")
        if bad := int(row["bad_gradients"]):
            self.progress.say(
                f"{self.nimg:>11,} images: {bad:,} values of gradients were not finite since the last line."
            )

    def _averaged(self) -> dict[str, Any]:
        """The averaged weights as the network takes them, whole on every device.

        Where they are dealt out they are so gathered once, and not in every pass (see fsdp_over_mesh in parallel.py).
        """
        state = self.parallel.get_state(self.state)
        return put({"params": state.ema, **state.constants}, replicated(self.mesh))

    def _evaluate(self, stop: Stop) -> bool:
        """Whether it was done, and not broken off by a signal."""
        assert self.evaluator is not None
        if not self.evaluator.compiled:
            self.progress.say("Compiling the evaluation: the first time, minutes for a large network.")

        def broken_off() -> bool:  # after every batch
            self.watchdog.at("an evaluation")
            return stop.now()

        with self.meter.paused():
            self.watchdog.at("an evaluation")
            with self._within_memory("evaluation", "eval", "batch_size"):
                figures = self.evaluator(self._averaged(), broken_off)
            if figures is None:
                return False
            self.watchdog.at("figures to be written")
            if self.writers is not None:
                self.writers.scalars({"step": self.step, "nimg": self.nimg} | figures | {"seconds": self._seconds()})
            self.progress.say(f"{self.nimg:>11,} images: {in_words(figures)}")
        return True

    def _save(self) -> None:
        with self.meter.paused():
            self.watchdog.at("a checkpoint to be written")
            position = self.batches.get_state(unused=self._unused())
            meta = {"config": self.config.to_dict(), "data": position}
            self.checkpoints.save(self.step, self.parallel.get_state(self.state), meta)

    def _make_up(self, stop: Stop) -> bool:
        """Evaluate and sample where the last start was ended before it could; whether that was not broken off."""
        to_evaluate, to_sample = self._undone()
        if self._due(self.eval_steps) and to_evaluate and not self._evaluate(stop):
            return False
        if self._due(self.sample_steps) and to_sample:
            self._sample()
        return True

    @contextlib.contextmanager
    def _closing(self) -> Iterator[contextlib.ExitStack]:
        """A stack of what is to be closed, but not after another process was lost: to close would be to wait for it."""
        with contextlib.ExitStack() as stack:
            try:
                yield stack
            except Exception as error:
                if jax.process_count() > 1 and lost_another(error):
                    stack.pop_all()
                raise

    def _close_checkpoints(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Where this process alone ends, the others do not know it yet: they wait for its part of the next step, and what
        # they still have to do for a checkpoint may wait with them.
        alone = error is not None and jax.process_count() > 1
        # Where the storage fails, TensorStore may go on trying for a quarter of an hour.
        self.checkpoints.close(PATIENCE if alone or file_trouble(error) else None)

    def _unused(self) -> int:
        """Batches that are on the devices before their time."""
        return sum(count for count, _ in self.placed)

    def _send(self) -> None:
        """Send the next step, or several as one program, to the devices."""
        self.watchdog.at("data")
        count, batch = self._next_batches()
        self.watchdog.at("the devices (a compilation, a step, or another process)")
        run: Any = self.parallel.step if count == 1 else self.parallel.steps
        if self.check is not None:  # the call below finds it compiled, as one of pmap's would not
            self.check(run.lower(self.state, batch).compile())
            self.check = None
        self.state, metrics = run(self.state, batch)
        self.step += count
        self.meter.sent(metrics)

    def _next_batches(self) -> tuple[int, Any]:
        """(how many, they on the devices); the transfer of later ones is begun, to run beside the step.

        Several at once begin at multiples of their number only, so that a run that was stopped in between is computed
        by the same programs as one that was not.
        """
        while len(self.placed) <= self.config.data.device_prefetch:
            ahead = self.step + self._unused()
            if ahead >= self.total_steps:
                break
            if self.together > 1 and ahead % self.together == 0 and ahead + self.together <= self.total_steps:
                batches = [next(self.batches) for _ in range(self.together)]
                self.placed.append((self.together, self.parallel.put_batches(batches)))
            else:
                self.placed.append((1, self.parallel.put_batch(next(self.batches))))
        return self.placed.popleft()

    def _undone(self) -> tuple[bool, bool]:
        """Whether there is no evaluation, and no picture, of the step that this start goes on from.

        The first process looks, for all: they must agree, and files may show later in one than in the other.
        """
        undone = [False, False]
        if self.step and self.writers is not None:
            evaluated = any(row["step"] == self.step and is_evaluation(row) for row in self.writers.rows)
            undone = [not evaluated, not self._picture().exists()]
        evaluation, picture = multihost_utils.broadcast_one_to_all(np.array(undone))
        return bool(evaluation), bool(picture)

    @contextlib.contextmanager
    def _within_memory(self, what: str, section: str, number: str) -> Iterator[None]:
        """Memory that is full is no fault of the steps here, but of a number in a section of the configuration."""
        try:
            yield
        except Exception as error:
            if (said := memory_full(error)) is None:
                raise
            raise UserError(
                f"Memory is full ({said}) in the {what} of step {self.step:,}: go on with a smaller --config.{section}.{number} "
                f"than {self.config[section][number]}, or without (--config.{section}.every_images=0). Nothing already "
                "saved is lost."
            ) from error

    def _picture(self) -> Path:
        return self.workdir / "samples" / f"{self.nimg:012d}.png"

    def _sample(self) -> None:
        """A grid from the EMA with seeds 0, 1, ...; with classes, a class per column."""
        with self.meter.paused():
            self.watchdog.at("a picture")
            rows, columns = self.sample_grid
            seeds = np.arange(rows * columns)
            if self.generator is None:
                self.progress.say("Compiling the sampler of the pictures: the first time, minutes for a large network.")
                generate = self.experiment.generate_fn()
                self.generator = BatchedGenerator(generate, self.mesh, len(seeds), check=program_check())
            try:
                with self._within_memory("picture", "samples", "rows"):
                    images = np.concatenate(list(self.generator(self._averaged(), seeds, seeds % columns)))
            except NotFinite as error:  # whether the run goes on is for the gradients to say
                self.progress.say(f"{self.nimg:>11,} images: no samples. {error}")
                return
            if self.writers is None:
                return
            scale = max(1, 32 // self.experiment.image_shape[0])
            grid = pictures.image_grid(images, columns, scale=scale)
            pictures.save_png(grid, self._picture())
            self.writers.image("samples", np.asarray(grid.convert("RGB")), self.nimg)
