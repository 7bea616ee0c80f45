"""What a run starts from: its newest checkpoint, the weights of another run, or nothing."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clu.parameter_overview
import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.errors import UserError
from fdm_jax.experiment import Experiment, differing_fields
from fdm_jax.host_memory import machine_memory
from fdm_jax.networks import SongUNet
from fdm_jax.training.checkpoints import Checkpoints, check_alike
from fdm_jax.training.step import TrainSpec, TrainState, init_state
from fdm_jax.whole_files import check_unclaimed, place, write_text

# Beginnings of those that decide the shapes of the weights, and of some among them that do not.
SHAPING_FIELDS = ("network.", "augment.labels", "data.resolution", "data.channels", "data.num_classes")
SHAPELESS_FIELDS = ("network.dtype", "network.dropout", "network.attention")


def check_configuration(checkpoints: Checkpoints, experiment: Experiment, workdir: Path) -> None:
    """Raise a UserError unless the run in a workdir, if there is one, is this one."""
    meta = checkpoints.latest_meta()
    if meta is None:
        return
    if "data" not in meta:
        raise UserError(
            f"{workdir} holds an imported model, which has no state of training to go on from: start from it "
            f"with --init_from={workdir} and another --workdir."
        )
    fields = differing_fields(meta["config"], experiment.config.to_dict())
    if fields:
        raise UserError(
            f"{workdir} holds a run of another configuration, which differs in {'; '.join(fields)}: "
            "give the same configuration to go on, or another --workdir."
        )


def fresh_state(
    network: SongUNet, spec: TrainSpec, image_shape: tuple[int, int, int], state_sharding: Callable[[Any], Any]
) -> tuple[Any, Callable[[], TrainState]]:
    """The state before the first step, where it is to lie: shapes with shardings, and what makes it.

    Args:
      network, spec, image_shape: see :func:`~fdm_jax.training.step.init_state`.
      state_sharding: shapes of a state -> where each of its arrays is to lie.

    Raises:
      UserError: that does not fit into memory, see :func:`check_memory`.
    """

    def fresh() -> TrainState:
        return init_state(network, spec, image_shape)

    shapes = jax.eval_shape(fresh)
    shardings = state_sharding(shapes)
    init = jax.jit(
        fresh,
        out_shardings=shardings,
        # Run once: LLVM's optimisations would take three times as long as they save.
        compiler_options={"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None,
    )
    shapes = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    check_memory(shapes)
    return shapes, init


def check_memory(state: Any) -> None:
    """Raise a UserError if a state of training, its shapes with shardings, is by itself more than the memory there is.

    Not every system refuses memory that it has not: Linux gives it, and kills who uses it.
    """
    need = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(state))
    devices = jax.local_devices()
    if devices[0].platform == "cpu":  # which are parts of one machine
        need, have, where, instead = need * len(devices), machine_memory(), "this machine", "take a machine with more"
    else:
        have = min((device.memory_stats() or {}).get("bytes_limit", math.inf) for device in devices)
        where = f"a device ({devices[0].device_kind})"
        instead = "deal the state to more devices with --config.parallel=fsdp"
    if need > have:
        count = sum(math.prod(a.shape) for a in jax.tree.leaves(state.params))
        raise UserError(
            f"The network has {count:,} parameters: with Adam's moments and the average they take "
            f"{need / 2**30:,.1f} GiB, and {where} has {have / 2**30:,.1f} GiB: take a smaller network, or {instead}."
        )


def check_workdir(workdir: Path) -> None:
    """Refuse the folder of something else that is given as that of a run without checkpoints, such as the current one.

    Raises:
      UserError: a file of a name that many programs use would be written over.
      OSError: it cannot be read.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):
        saved = json.loads((workdir / "config.json").read_text())
        if isinstance(saved, dict) and "network" in saved:  # of a run that ended before its first checkpoint
            return
    check_unclaimed(
        workdir, ("config.json", "metrics.jsonl", "parameters.txt", "curves.png", "held_out.png"), "--workdir"
    )


def initial_state(
    experiment: Experiment, state_sharding: Callable[[Any], Any], checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, Any] | None]:
    """The state to go on from, canonical, and the position in the data; None for that if the run is new.

    Args:
      experiment: the run.
      state_sharding: shapes of a state -> where each of its arrays is to lie.
      checkpoints: of the run.

    Raises:
      UserError: the state does not fit into memory; there are checkpoints, and none can be read; or init_from names no
        model of this shape.
    """

    shapes, init = fresh_state(experiment.network, experiment.spec, experiment.image_shape, state_sharding)
    restored = checkpoints.restore(shapes)
    if restored is not None:
        state, meta = restored
        return state, meta["data"]
    variables = weights_of_another_run(experiment)
    state = init()
    if variables is not None:
        state = _with_weights(state, variables)
    return state, None


def list_parameters(params: Any, workdir: Path) -> None:
    """Write ``parameters.txt``, and say how many they are."""
    path = workdir / "parameters.txt"
    write_text(path, clu.parameter_overview.get_parameter_overview(params, include_stats=False) + "\n")
    print(f"Parameters: {clu.parameter_overview.count_parameters(params):,}, listed in {path}.", flush=True)


def weights_of_another_run(experiment: Experiment) -> Any:
    """The averaged weights that ``init_from`` names, {"params": ..., ...constants}; None if it names none.

    Raises:
      UserError: it names no model, or one that is not of this shape.
    """
    if not experiment.config.init_from:
        return None
    workdir = place(experiment.config.init_from)
    like = jax.eval_shape(lambda: init_state(experiment.network, experiment.spec, experiment.image_shape))
    step, variables, meta = Checkpoints(workdir / "checkpoints", read_only=True).restore_model()
    try:
        check_alike(variables, {"params": like.params, **like.constants}, "this configuration's network")
    except UserError as error:
        fields = differing_fields(meta["config"], experiment.config.to_dict())
        shaping = ", ".join(f for f in fields if f.startswith(SHAPING_FIELDS) and not f.startswith(SHAPELESS_FIELDS))
        more = f" The configurations differ in {shaping}." if shaping else ""
        raise UserError(f"init_from={workdir} cannot be used: {error}{more}") from error
    if jax.process_index() == 0:
        print(f"Weights: the average of {workdir}, step {step:,}.", flush=True)
    return variables


def _with_weights(state: TrainState, variables: Any) -> TrainState:
    """The first state of a run with the averaged weights of another."""
    # Computed, not put: what is put on a device may share memory with where it came from, and the first step gives
    # both parameters and average away.
    host = jax.tree.map(np.asarray, variables)
    shardings = jax.tree.map(lambda a: a.sharding, {"params": state.params, **state.constants})
    copies = jax.jit(lambda v: jax.tree.map(jnp.copy, (v, v["params"])), out_shardings=(shardings, shardings["params"]))
    own, ema = copies(host)
    return state.replace(params=own.pop("params"), ema=ema, constants=own)
