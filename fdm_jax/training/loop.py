"""The training loop: the shell that feeds the pure step, and keeps what it gives."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fdm_jax import pictures
from fdm_jax.data.pipeline import Batches, make_batches
from fdm_jax.data.sources import Source
from fdm_jax.defaults import to_json
from fdm_jax.devices import make_mesh
from fdm_jax.errors import RestartNeeded, UserError
from fdm_jax.experiment import Experiment, differing_fields
from fdm_jax.progress import Progress
from fdm_jax.sampling.generate import BatchedGenerator, make_generate_fn
from fdm_jax.training.agreement import check_data, check_workdir
from fdm_jax.training.checkpoints import Checkpoints, check_alike
from fdm_jax.training.evaluating import Evaluator
from fdm_jax.training.locking import locked
from fdm_jax.training.metrics import is_evaluation
from fdm_jax.training.parallel import parallelise
from fdm_jax.training.step import TrainState, init_state, make_train_step
from fdm_jax.training.stopping import stop_requests
from fdm_jax.training.writers import Writers
from fdm_jax.whole_files import make_folder, place, write_text

# Programs sent to the devices before the metrics of the first are waited for: keeps them busy, bounds the queue.
PROGRAMS_IN_FLIGHT = 4


def train(experiment: Experiment, source: Source, workdir: Path, watch: Callable[[int], None] | None = None) -> bool:
    """Train, or go on training, in a workdir.

    Writes ``config.json``, ``parameters.txt``, ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``, ``samples/*.png``,
    ``curves.png`` and, if the run evaluates, ``held_out.png``.  The same call again continues the run from its newest
    checkpoint, bit for bit.

    Args:
      experiment: what to train.
      source: the data.
      workdir: made if it is not there.
      watch: for profilers; called with the number of steps so far each time that some were sent to the devices.

    Several processes call it alike, with a workdir that all of them see.

    Returns:
      True if the run is complete; False if a signal (SIGTERM, Ctrl-C) ended it early, saved.

    Raises:
      RestartNeeded: one of several processes was told to end; the run is saved.
      UserError: the workdir is in use or belongs to another configuration, the batch cannot be dealt to the
        devices, or the gradients were not finite too often in a row.
    """
    experiment.check_devices(jax.device_count())
    with locked(workdir, hold=jax.process_index() == 0):
        check_workdir(workdir)
        return _Run(experiment, source, workdir).train(watch)


class _Run:
    """One start of a run."""

    def __init__(self, experiment: Experiment, source: Source, workdir: Path):
        self.began = time.monotonic()
        self.experiment, self.workdir, self.config = experiment, workdir, experiment.config
        self.batch_size = experiment.spec.batch_size
        self.main = jax.process_index() == 0
        self.mesh = make_mesh()
        self.parallel = parallelise(
            self.config.parallel,
            lambda axis: make_train_step(experiment.network, experiment.family, experiment.spec, axis_name=axis),
            self.mesh,
        )
        self.total_steps = -(-self.config.train.images // self.batch_size)
        self.at_once = self.config.train.steps_at_once
        self.checkpoint_steps = self._steps(self.config.checkpoint.every_images)
        keep = round(self.config.checkpoint.keep_every_images / self.batch_size / self.checkpoint_steps)
        self.checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep_latest=self.config.checkpoint.keep_latest,
            keep_every_steps=max(keep, 1) * self.checkpoint_steps,
        )
        self._check_config()
        check_data(source)
        self.evaluator = Evaluator(experiment, self.mesh) if self.config.eval.every_images else None
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
        self.generator: BatchedGenerator | None = None

    def _steps(self, images: int) -> int:
        """An interval in images as the nearest number of whole programs, in steps."""
        return max(round(images / self.batch_size / self.at_once), 1) * self.at_once

    def _check_config(self) -> None:
        meta = self.checkpoints.latest_meta()
        if meta is not None and "data" not in meta:
            raise UserError(
                f"{self.workdir} holds an imported model, which has no state of training to go on from: start from it "
                f"with --init_from={self.workdir} and another --workdir."
            )
        if meta is not None:
            fields = differing_fields(meta["config"], self.config.to_dict())
            if fields:
                raise UserError(
                    f"{self.workdir} holds a run of another configuration, which differs in {'; '.join(fields)}: "
                    "give the same configuration to go on, or another --workdir."
                )

    def _initial_state(self) -> TrainState:
        """From the newest checkpoint, or fresh; canonical."""

        def fresh() -> TrainState:
            return init_state(self.experiment.network, self.experiment.spec, self.experiment.image_shape)

        shapes = jax.eval_shape(fresh)
        shardings = self.parallel.state_sharding(shapes)
        init = jax.jit(
            fresh,
            out_shardings=shardings,
            # Run once: LLVM's optimisations would take three times as long as they save.
            compiler_options={"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None,
        )
        like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
        restored = self.checkpoints.restore(like)
        if restored is None:
            state = init()
            if self.config.init_from:
                state = self._with_weights_of(state, place(self.config.init_from))
            if self.main:
                overview = clu.parameter_overview.get_parameter_overview(state.params, include_stats=False)
                write_text(self.workdir / "parameters.txt", overview + "\n")
                count = clu.parameter_overview.count_parameters(state.params)
                print(f"Parameters: {count:,}, listed in {self.workdir / 'parameters.txt'}.", flush=True)
            return state
        state, meta = restored
        self.batches.set_state(meta["data"])
        return state

    def _with_weights_of(self, state: TrainState, workdir: Path) -> TrainState:
        """The first state of a run with the averaged weights of another."""
        step, variables, _ = Checkpoints(workdir / "checkpoints", read_only=True).restore_model()
        try:
            check_alike(variables, {"params": state.params, **state.constants}, "this configuration's network")
        except UserError as error:
            raise UserError(f"init_from={workdir} cannot be used: {error}") from error
        if self.main:
            print(f"Weights: the average of {workdir}, step {step:,}.", flush=True)
        # Computed, not put: what is put on a device may share memory with where it came from, and the first step gives
        # both parameters and average away.
        host = jax.tree.map(np.asarray, variables)
        shardings = jax.tree.map(lambda a: a.sharding, {"params": state.params, **state.constants})
        copies = jax.jit(
            lambda v: jax.tree.map(jnp.copy, (v, v["params"])), out_shardings=(shardings, shardings["params"])
        )
        own, ema = copies(host)
        return state.replace(params=own.pop("params"), ema=ema, constants=own)

    def train(self, watch: Callable[[int], None] | None = None) -> bool:
        state = self._initial_state()
        if self.main:  # not before it is sure that the run goes on with it
            write_text(self.workdir / "config.json", to_json(self.config))
        step = first_step = int(state.step)
        writers = Writers(self.workdir, step, step * self.batch_size) if self.main else None
        progress = Progress(self.total_steps * self.batch_size, step * self.batch_size, quiet=not self.main)
        if step:
            progress.say(f"Going on from step {step:,} ({step * self.batch_size:,} images).")
        parallel = self.parallel
        device_state = parallel.put_state(state)
        del state
        log_steps = self._steps(self.config.log.every_images)
        eval_steps, sample_steps = (
            self._steps(section.every_images) if section.every_images else None
            for section in (self.config.eval, self.config.samples)
        )
        seconds_before = max((row.get("seconds") or 0.0 for row in writers.rows), default=0.0) if writers else 0.0
        pending: collections.deque[Any] = collections.deque()
        rows: list[dict[str, float]] = []
        tick = time.monotonic()

        def fetch(most: int) -> None:
            """Wait for metrics until at most so many programs are in flight."""
            while len(pending) > most:
                fetched = jax.device_get(parallel.get_metrics(pending.popleft()))
                columns = {key: np.atleast_1d(value).tolist() for key, value in fetched.items()}
                for values in zip(*columns.values(), strict=True):
                    rows.append(dict(zip(columns, map(float, values), strict=True)))
                bad_steps = int(rows[-1]["bad_steps"])
                if bad_steps >= self.config.train.max_bad_steps:
                    raise UserError(
                        f"The gradients were not finite in {bad_steps} steps in a row: train.learning_rate "
                        f"({self.config.train.learning_rate}) may be too high; the newest checkpoint is of step "
                        f"{max(self.checkpoints.steps(), default=0)}."
                    )

        def due(every: int | None) -> bool:
            """Whether what is done every so many steps, and at the end, is to be done now."""
            return every is not None and (step % every == 0 or step == self.total_steps)

        def report() -> None:
            """A row of the steps since the last one."""
            nonlocal tick
            fetch(0)
            now = time.monotonic()
            row = _summary(step, step * self.batch_size, rows)
            counted = step - max(step - len(rows), warm_from)
            speed = counted * self.batch_size / max(now - tick, 1e-9)
            if counted:
                row["img_per_s"] = speed
            row["seconds"] = seconds_before + now - self.began
            if writers is not None:
                writers.scalars(row)
            progress.report(speed, f"loss {row['loss']:<8.4g}")
            rows.clear()
            tick = now

        def evaluate() -> bool:
            """Whether it was done, and not broken off by a signal."""
            nonlocal tick
            fetch(0)
            began = time.monotonic()
            if figures := self._evaluate(parallel.get_state(device_state), stop.now):
                figures["seconds"] = seconds_before + time.monotonic() - self.began
                if writers is not None:
                    writers.scalars({"step": step, "nimg": step * self.batch_size} | figures)
                progress.say(f"{step * self.batch_size:>11,} images: {_in_words(figures)}")
            tick += time.monotonic() - began
            return figures is not None

        def sample() -> None:
            nonlocal tick
            fetch(0)
            began = time.monotonic()
            self._write_samples(parallel.get_state(device_state), step * self.batch_size, writers)
            tick += time.monotonic() - began

        with stop_requests() as stop, self._closing() as closing:
            closing.callback(self.checkpoints.close)
            closing.callback(self.batches.close)
            closing.callback(progress.close)
            if writers is not None:
                closing.callback(writers.close)
            stopping, programs, warm_from = False, 0, first_step
            # What the last start was ended before.
            to_evaluate, to_sample = self._undone(step, writers)
            if due(eval_steps) and to_evaluate:
                stopping = not evaluate()
            if due(sample_steps) and to_sample and not stopping:
                sample()
            while step < self.total_steps and not stopping:
                count, batch = self._next_batches(step)
                device_state, metrics = (parallel.step if count == 1 else parallel.steps)(device_state, batch)
                programs += 1
                step += count
                pending.append(metrics)
                if programs == 1:
                    fetch(0)
                    warm_from = step
                    progress.say(f"First step done {time.monotonic() - self.began:.1f} s after the start.")
                    tick = time.monotonic()  # compilation is not training speed
                fetch(PROGRAMS_IN_FLIGHT)
                progress.advance(step * self.batch_size)
                if watch is not None:
                    watch(step)
                last = step == self.total_steps
                stopping = stop.after(programs)
                if step % log_steps == 0 or last or stopping:
                    report()
                # Before the checkpoint: after a crash between the two, the run goes on from before both.
                evaluated = False
                if due(eval_steps) and not stopping:
                    evaluated = evaluate()
                    stopping = not evaluated  # here, where the next start finds that it is still to be done
                    if stopping and rows:
                        report()
                if step % self.checkpoint_steps == 0 or last or stopping or evaluated:
                    fetch(0)
                    self._save(step, parallel.get_state(device_state))
                    tick = time.monotonic() if not rows else tick
                if due(sample_steps) and not stopping:
                    sample()
            self.checkpoints.wait()
            if writers is not None:
                _write_curves(self.workdir, writers.rows)
            # Stopped after the last step, what belongs to the end is still to be done.
            complete = step >= self.total_steps and not (stopping and any(map(due, (eval_steps, sample_steps))))
            if not complete:
                sentence = f"Stopped by {stop.reason} at step {step:,}, saved; the same command goes on from here."
                if stop.preempted:
                    raise RestartNeeded(sentence)
                progress.say(sentence)
        return complete

    @contextlib.contextmanager
    def _closing(self) -> Iterator[contextlib.ExitStack]:
        """A stack of what is to be closed, but not after another process was lost: to close would be to wait for it."""
        with contextlib.ExitStack() as stack:
            try:
                yield stack
            except jax.errors.JaxRuntimeError:
                if jax.process_count() > 1:
                    stack.pop_all()
                raise

    def _unused(self) -> int:
        """Batches that are on the devices before their time."""
        return sum(count for count, _ in self.placed)

    def _next_batches(self, step: int) -> tuple[int, Any]:
        """(how many, they on the devices), after so many steps; the transfer of later ones is begun, to run beside the step.

        Several at once begin at multiples of their number only, so that a run that was stopped in between is computed
        by the same programs as one that was not.
        """
        while (
            len(self.placed) <= self.config.data.device_prefetch and (ahead := step + self._unused()) < self.total_steps
        ):
            if self.at_once > 1 and ahead % self.at_once == 0 and ahead + self.at_once <= self.total_steps:
                batches = [next(self.batches) for _ in range(self.at_once)]
                self.placed.append((self.at_once, self.parallel.put_batches(batches)))
            else:
                self.placed.append((1, self.parallel.put_batch(next(self.batches))))
        return self.placed.popleft()

    def _save(self, step: int, state: TrainState) -> None:
        position = self.batches.get_state(unused=self._unused())
        self.checkpoints.save(step, state, {"config": self.config.to_dict(), "data": position})

    def _evaluate(self, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        assert self.evaluator is not None
        return self.evaluator({"params": state.ema, **state.constants}, stop)

    def _undone(self, step: int, writers: Writers | None) -> tuple[bool, bool]:
        """Whether there is no evaluation, and no picture, of the step that this start goes on from.

        The first process looks, for all: they must agree, and files may show later in one than in the other.
        """
        undone = [False, False]
        if step and writers is not None:
            evaluated = any(row["step"] == step and is_evaluation(row) for row in writers.rows)
            undone = [not evaluated, not self._picture(step * self.batch_size).exists()]
        evaluation, picture = multihost_utils.broadcast_one_to_all(np.array(undone))
        return bool(evaluation), bool(picture)

    def _picture(self, nimg: int) -> Path:
        return self.workdir / "samples" / f"{nimg:012d}.png"

    def _write_samples(self, state: TrainState, nimg: int, writers: Writers | None) -> None:
        """A grid from the EMA with seeds 0, 1, ...; with classes, a class per column."""
        samples, classes = self.config.samples, self.experiment.num_classes
        columns = min(samples.columns, classes) if classes else samples.columns
        seeds = np.arange(samples.rows * columns)
        if self.generator is None:
            generate = make_generate_fn(
                self.experiment.network, self.experiment.family, self.experiment.image_shape, classes, steps=samples.steps
            )  # fmt: skip
            self.generator = BatchedGenerator(generate, self.mesh, len(seeds))
        variables = {"params": state.ema, **state.constants}
        images = np.concatenate([images for _, images in self.generator(variables, seeds, seeds % columns)])
        if writers is None:
            return
        scale = max(1, 32 // self.experiment.image_shape[0])
        grid = pictures.image_grid(images, columns, scale=scale)
        make_folder(self.workdir / "samples")
        pictures.save_png(grid, self._picture(nimg))
        writers.image("samples", np.asarray(grid.convert("RGB")), nimg)


def _summary(step: int, nimg: int, rows: list[dict[str, float]]) -> dict[str, float]:
    """Means of the steps since the last row; counts as sums; what is set by a schedule as it is now."""
    row: dict[str, float] = {"step": step, "nimg": nimg}
    for key, latest in rows[-1].items():
        values = [r[key] for r in rows]
        if key in ("loss", "grad_norm"):
            row[key] = float(np.mean(values))
        elif key == "bad_gradients":
            row[key] = float(np.sum(values))
        else:
            row[key] = latest
    return row


def _in_words(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if "@" not in name and name != "seconds")


def _write_curves(workdir: Path, rows: list[dict[str, Any]]) -> None:
    """Loss and held-out error against images seen, for the eye."""
    for key, file, label in (("loss", "curves.png", "loss"), ("val/error", "held_out.png", "held-out error")):
        points = [(row["nimg"], row[key]) for row in rows if row.get(key) is not None]
        if len(points) > 1:
            nimg, values = zip(*points, strict=True)
            pictures.curves_png(workdir / file, {label: (nimg, values)}, "images seen", label, logy=key == "loss")
