"""Checkpoints: everything a run needs to go on, written in the background by Orbax.

A checkpoint has three parts: "model" (EMA and constants: what sampling needs), "train" (parameters, optimiser,
counters) and "meta" (configuration and position in the data, as JSON).  None of them depends on the number of
devices or processes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from fdm_jax.devices import one_copy_per_process
from fdm_jax.errors import UserError
from fdm_jax.owners import allow_nameless_owners
from fdm_jax.storage_errors import system_fails
from fdm_jax.training.agreement import in_all, of_the_first
from fdm_jax.training.metrics import ranking_figures, read_metrics
from fdm_jax.training.step import TrainState
from fdm_jax.whole_files import check_utf8, is_remote, move_folder, remove_folder, resolved

allow_nameless_owners()  # Orbax looks at a checkpoint that does not say when it was written

log = logging.getLogger(__name__)

BEST = "best"  # in the place of a step: the checkpoint with the lowest figure
_MODEL = ("ema", "constants")


def _split(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, train) as nested dicts of arrays."""
    fields = flax.serialization.to_state_dict(state)
    return {k: fields[k] for k in _MODEL}, {k: v for k, v in fields.items() if k not in _MODEL}


@dataclasses.dataclass
class _One(policies.PreservationPolicy):
    """Keeps the checkpoint of one step, asked for at every save."""

    which: Callable[[Sequence[int]], int | None]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        kept = self.which(steps)
        return [step == kept for step in steps]


def _in_a_line(error: BaseException) -> str:
    """What went wrong first, without the pages that Orbax adds of how TensorStore was called."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200]


class _Unreadable(Exception):
    """A checkpoint that cannot be read; the message says why."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, but that it does not ask whether the run is to stop.

    JAX's service takes the number in the last question for the place where this process is, and stops all at the next
    one.  Orbax asks with the step, also from the thread that ends a save; the loop counts from its start (see
    ``fdm_jax.training.stopping``), and of a run that went on would come to such a number late or never.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of a run, by optimiser step.

    Args:
      directory: made if it is not there (unless read-only); ``metrics.jsonl`` beside it says which checkpoint is best.
      keep_latest: how many of the newest are kept, and beside them, at each save, the best of those evaluated; None for all.
      keep_every_steps: those at multiples of this are kept for good; None for none.
      read_only: nothing is written, deleted or moved.

    Raises:
      UserError: the directory's name is not UTF-8, or Orbax's note of when one was written is damaged.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_latest: int | None = None,
        keep_every_steps: int | None = None,
        read_only: bool = False,
    ):
        self._directory, self._read_only = resolved(directory), read_only
        check_utf8(self._directory)
        self._metrics = directory.parent / "metrics.jsonl"
        keep: list[policies.PreservationPolicy] = []
        if not read_only and keep_latest is not None:
            keep += [policies.LatestN(keep_latest), _One(self._best_of)]
            if keep_every_steps is not None:
                keep.append(policies.EveryNSteps(keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keep) if keep else None,
            save_interval_steps=0 if read_only else 1,  # with another number Orbax warns that it takes 0
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        try:
            self._manager = _Manager(self._directory, options=options, item_names=("model", "train", "meta"))
        except (ValueError, TypeError) as error:
            if (file := self._damaged_metadata()) is None:
                raise
            raise UserError(
                f"{file} is damaged ({error}): delete it, nothing of the checkpoint itself is in it."
            ) from error
        self._arrays = ocp.StandardCheckpointHandler()

    def _damaged_metadata(self) -> Path | None:
        """Of the files that say when a checkpoint was written, all of which Orbax reads first, one that it cannot read."""
        names = ocp.path.step.standard_name_format()
        for file in sorted(self._directory.glob("[0-9]*/_CHECKPOINT_METADATA")):
            if file.parent.name.isdecimal():
                try:
                    _ = names.find_step(self._directory, int(file.parent.name)).commit_timestamp_nsecs
                except (ValueError, TypeError):
                    return file
        return None

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Start writing; returns once the arrays are copied.  Does nothing if the step is saved already.

        Args:
          step: optimiser step.
          state: canonical.
          meta: JSON.
        """
        if step in self._manager.all_steps():
            return
        # One copy: Orbax would cut a part out of each device's, one launch for each array and device.
        model, train = one_copy_per_process(_split(state))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(model), train=ocp.args.StandardSave(train), meta=ocp.args.JsonSave(meta)
            ),
        )

    def best(self) -> int | None:
        """The step with the lowest figure; None if none was measured."""
        return self._best_of(self.steps())

    def _best_of(self, steps: Sequence[int]) -> int | None:
        # The figures are not Orbax's: it can neither be told one later nor read past one that is damaged.
        figures = ranking_figures(read_metrics(self._metrics))
        return min((step for step in steps if step in figures), key=lambda step: figures[step], default=None)

    def save_model(self, step: int, variables: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write a checkpoint that has no "train" part, of {"params": ..., ...constants}; a run starts from it, not on."""
        constants = {name: value for name, value in variables.items() if name != "params"}
        model = {"ema": variables["params"], "constants": constants}
        self._manager.save(
            step, args=ocp.args.Composite(model=ocp.args.StandardSave(model), meta=ocp.args.JsonSave(meta))
        )

    def delete(self, step: int) -> None:
        """Remove one checkpoint."""
        self._manager.delete(step)

    def wait(self) -> None:
        """Wait until what was started is written; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self, seconds: float | None = None) -> None:
        """Wait, for so many seconds at most, and give the background threads back; raises what went wrong."""
        closing = ThreadPoolExecutor(1)
        closed = closing.submit(self._close)
        closing.shutdown(wait=False)  # takes nothing more
        if wait([closed], seconds).done:
            closed.result()
        else:
            log.warning("A checkpoint is not complete after %g s, and is left so; those before it stay.", seconds)

    def _close(self) -> None:
        self._manager.close()
        self._arrays.close()

    def latest_meta(self) -> dict[str, Any] | None:
        """The JSON part of the newest checkpoint whose part can be read; None if there is none."""
        for step in reversed(of_the_first(self.steps())):
            try:
                return self._read(step)["meta"]
            except _Unreadable as error:
                log.warning("The checkpoint of step %d cannot be read: %s", step, error)
        return None

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read: (state, meta), or None if there is no checkpoint at all.

        Newer ones that cannot be read are said so in the log and moved out of the way, to ``damaged/`` beside it (on
        gs://, beside the folder of checkpoints).  Where none can be read, the cause is more likely to be elsewhere
        (memory, permissions, other releases of packages), and all of them stay.

        Args:
          like: shapes, types and shardings to restore to.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        steps, unreadable = of_the_first(self.steps()), dict[int, str]()
        model, train = _split(like)
        for step in reversed(steps):
            try:
                parts = self._read(step, model=model, train=train)
            except _Unreadable as error:
                unreadable[step] = str(error)
                log.warning("The checkpoint of step %d is damaged (%s); trying the one before.", step, unreadable[step])
                continue
            if unreadable and not self._read_only:
                self._set_aside(list(unreadable))
            return flax.serialization.from_state_dict(like, {**parts["model"], **parts["train"]}), parts["meta"]
        if steps:
            raise UserError(
                f"None of the {len(steps)} checkpoints in {self._directory} can be read ({unreadable[steps[-1]]}): all are "
                "left as they are; mend the cause, or start again with another --workdir."
            )
        return None

    def restore_model(self, step: int | str | None = None) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """(step, {"params": EMA, ...constants}, meta) of one checkpoint: "best", or by default the newest that can be read.

        Raises:
          UserError: no such checkpoint, or none that can be read.
        """
        steps = of_the_first(self.steps())
        if not steps:
            raise UserError(f"There is no checkpoint in {self._directory}: train first.")
        if step == BEST and (step := self.best()) is None:
            raise UserError(
                f"No checkpoint in {self._directory} was evaluated while it was trained (config.eval.every_images), so none "
                f"is the best: choose one of {', '.join(map(str, steps))}."
            )
        if step is not None and step not in steps:
            raise UserError(f"There is no checkpoint of step {step}: choose one of {', '.join(map(str, steps))}.")
        for candidate in reversed(steps) if step is None else [step]:
            try:
                parts = self._read(candidate, model=None)
                model = parts["model"]
                return candidate, {"params": model["ema"], **(model.get("constants") or {})}, parts["meta"]
            except _Unreadable as error:
                log.warning("The checkpoint of step %d cannot be read: %s", candidate, error)
        raise UserError(f"No checkpoint in {self._directory} can be read.")

    def _read(self, step: int, **wanted: Any) -> dict[str, Any]:
        """The parts of one checkpoint that are named, each as shapes with shardings (None: on one device), and "meta".

        Several processes read alike, and all of them can, or none: each sees files of its own (under fsdp) and in its own
        time.  Orbax's manager would have those that could wait for those that could not.

        Raises:
          _Unreadable: in some process; it is damaged, or of other shapes or packages.
          Exception: memory or the storage does not give it here, and it may be whole; the others then lose this process.
        """
        folder, cause = self._directory / str(step), "another process cannot read it"
        parts: dict[str, Any] | None = None
        try:
            meta = ocp.JsonCheckpointHandler().restore(folder / "meta", ocp.args.JsonRestore())
            if not isinstance(meta, dict) or "config" not in meta:
                raise ValueError(f"{folder / 'meta'} holds no configuration")
            parts = {"meta": meta}
            for name, like in wanted.items():
                shapes = self._shapes_here(folder / name) if like is None else like
                parts[name] = self._arrays.restore(folder / name, args=ocp.args.StandardRestore(shapes))
                self._check_types(parts[name], shapes)
        except Exception as error:  # Orbax, TensorStore and JSON each have their own
            if system_fails(error):
                raise  # the checkpoint may be whole
            parts, cause = None, _in_a_line(error)
        if not in_all(parts is not None):
            raise _Unreadable(cause)
        assert parts is not None
        return parts

    def _shapes_here(self, part: Path) -> Any:
        """What a part holds, to be put on one device here: without this, Orbax wants those it was saved from."""
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), self._arrays.metadata(part).tree
        )

    @staticmethod
    def _check_types(found: Any, wanted: Any) -> None:
        """Orbax casts silently where a stored type differs; a run must not change its precision that way."""

        def check(a: Any, b: Any) -> None:
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise ValueError(f"{a.shape} {a.dtype} stored, {b.shape} {b.dtype} expected")

        jax.tree.map(check, found, wanted)

    def _set_aside(self, steps: list[int]) -> None:
        """Move checkpoints that cannot be read out of the way."""
        if jax.process_index() == 0:
            # Not among the checkpoints on gs://, where Orbax takes a folder without its mark for a save that was cut off.
            beside = self._directory.parent if is_remote(self._directory) else self._directory
            for step in steps:
                target = beside / "damaged" / str(step)
                if target.exists():
                    remove_folder(target)
                move_folder(self._directory / str(step), target)
        multihost_utils.sync_global_devices(f"checkpoints {steps} set aside")  # which all of them found damaged
        self._manager.reload()


def check_alike(found: Any, wanted: Any, what: str) -> None:
    """Refuse variables whose names or shapes are not those of ``wanted``; ``what`` names the latter in the error.

    Raises:
      UserError: naming the first that differs.
    """
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, wanted))
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        ours, theirs = (each.get(name, "absent") for each in shapes)
        if ours != theirs:
            raise UserError(f"the tensors are not those of {what}: {name} is {ours}, and should be {theirs}.")


def read_config(workdir: Path) -> dict[str, Any]:
    """The configuration that a workdir's run was started with.

    Raises:
      UserError: it is no workdir, or its configuration cannot be read.
    """
    path = workdir / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not the workdir of a run: it has no config.json.") from None
    except NotADirectoryError:
        raise UserError(
            f"{workdir} is not the workdir of a run but a file: fdm import makes a workdir of an exported model or snapshot."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"The configuration {path} cannot be read: {error}") from error
