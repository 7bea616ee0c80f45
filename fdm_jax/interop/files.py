"""Models in files: written for PyTorch users, and read back from there or from the original's snapshots."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from fdm_jax import __version__
from fdm_jax.errors import UserError
from fdm_jax.interop.models import PRECONDITIONING, load_snapshot
from fdm_jax.interop.snapshots import import_torch
from fdm_jax.interop.state_dict import from_torch, to_torch
from fdm_jax.model import Model, load_run
from fdm_jax.networks.song_unet import PRESETS, SongUNet
from fdm_jax.storage_errors import system_fails
from fdm_jax.training.checkpoints import Checkpoints
from fdm_jax.training.locking import locked
from fdm_jax.whole_files import place, write_whole

FORMATS = {"safetensors": ".safetensors", "torch": ".pt"}
_FORMAT = "fdm_jax model, version 1"


def load_model(path: str | os.PathLike[str], checkpoint: int | str | None = None) -> Model:
    """The averaged weights of a run, or a model in a file.

    Args:
      path: a run's workdir (also gs://), a file of ``fdm export`` (``.safetensors`` or ``.pt``), or a snapshot of the
        PyTorch originals (``.pkl``), of which no code is executed.
      checkpoint: of a run, see :func:`~fdm_jax.model.load_run`.

    Raises:
      UserError: it is none of these, damaged, or has no such checkpoint.
    """
    path = place(path)
    if not path.is_file():
        return load_run(path, checkpoint)
    if checkpoint is not None:
        raise UserError(f"{path} is a file, and only a run's workdir has checkpoints: leave {checkpoint!r} out.")
    return load_file(path)


def load_file(path: Path) -> Model:
    """A model from a snapshot (``.pkl``) or from a file of :func:`export_model`.

    Raises:
      UserError: the file is of neither kind, damaged, or does not describe a network that there is here.
    """
    if path.suffix not in FORMATS.values():
        return load_snapshot(path)
    description = _read_description(path)
    try:
        state = _load_torch(path) if path.suffix == ".pt" else safetensors.numpy.load_file(path)
        return Model.from_config(description["config"], from_torch(state)).checked()
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    except Exception as error:  # torch and safetensors have errors of their own for damaged files
        if system_fails(error):
            raise
        reason = " ".join(str(error).split())[:150]
        raise UserError(f"{path} is damaged or incomplete, or not what its description says ({reason}).") from error


def import_model(path: Path, workdir: Path) -> Model:
    """Loads a model and writes it as the workdir of a run that is over: generation and evaluation take it as any other.

    Raises:
      UserError: see :func:`load_file`; or the workdir holds something already, or another process is at work in it.
    """
    model = load_file(path)
    with locked(workdir):
        if (workdir / "config.json").exists():
            raise UserError(f"{workdir} holds a run already: give another --workdir.")
        checkpoints = Checkpoints(workdir / "checkpoints")
        steps = checkpoints.steps()
        if steps not in ([], [0]):  # a run's own begin later
            raise UserError(f"{workdir} holds checkpoints of a run, though no config.json: give another --workdir.")
        if steps:  # of an import that was stopped: config.json comes last
            checkpoints.delete(0)
        meta = {"config": model.config, "imported": path.name}
        checkpoints.save_model(0, dict(model.variables), meta)
        checkpoints.close()
        config = json.dumps(model.config, indent=2, sort_keys=True) + "\n"
        write_whole(workdir / "config.json", lambda file: file.write_text(config))
    return model


def export_model(workdir: Path, path: Path, kind: str, step: int | str | None = None) -> dict[str, Any]:
    """Writes a checkpoint's average under the original's names, and beside it ``PATH.json``, which describes it.

    Args:
      workdir: of a run or an import.
      path: a new file.
      kind: a key of :data:`FORMATS`.
      step: of the checkpoint, or "best"; the newest by default.

    Returns:
      The description.

    Raises:
      UserError: no such checkpoint, torch is missing, or a file is there already or cannot be written.
    """
    if path.suffix != FORMATS[kind]:
        raise UserError(f"--out must end in {FORMATS[kind]} for --format={kind}, and is {path}.")
    if kind == "torch":
        import_torch("write a .pt file")
    beside = path.with_name(f"{path.name}.json")
    _check_new(path)
    step, variables, meta = Checkpoints(workdir / "checkpoints", read_only=True).restore_model(step)
    model = Model.from_config(meta["config"], variables).checked()
    state = to_torch(model.variables, PRESETS[model.network.preset]["resample_filter"])
    description = {
        "format": _FORMAT,
        "written_by": f"fdm_jax {__version__}",
        "checkpoint": step,
        "SongUNet": original_arguments(model.network),
        "preconditioning": original_preconditioning(model),
        "config": model.config,
    }
    text = json.dumps(description, indent=2) + "\n"
    # The same text is of this export, stopped in between: the model comes last.
    if not beside.is_file() or beside.read_bytes() != text.encode():
        _check_new(beside)
        write_whole(beside, lambda file: file.write_text(text))
    if kind == "torch":
        write_whole(path, lambda file: _save_torch(state, file))
    else:  # as bytes: safetensors has errors of its own for a full disk or a missing folder
        write_whole(path, lambda file: file.write_bytes(safetensors.numpy.save(state)))
    return description


def _check_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} is there already: delete it, or give another --out.")


def original_arguments(network: SongUNet) -> dict[str, Any]:
    """Keyword arguments that make the original's ``SongUNet`` of the same shape."""
    preset = PRESETS[network.preset]
    names = ("label_dim", "augment_dim", "model_channels", "channel_mult_emb", "num_blocks", "dropout", "label_dropout")
    return {
        "img_resolution": network.resolution, "in_channels": network.channels, "out_channels": network.channels,
        **{name: getattr(network, name) for name in names},
        "channel_mult": list(network.channel_mult), "attn_resolutions": list(network.attn_resolutions),
        "embedding_type": preset["embedding"], "channel_mult_noise": preset["channel_mult_noise"],
        "encoder_type": "residual" if preset["residual"] else "standard", "decoder_type": "standard",
        "resample_filter": list(preset["resample_filter"]),
    }  # fmt: skip


def original_preconditioning(model: Model) -> dict[str, Any]:
    """The original's class around the network, and what it takes."""
    momentum, family = model.family.momentum, model.config["family"]["name"]
    name = f"{family.upper()}Precond"
    fields = {theirs: getattr(model.family, ours) for theirs, ours in PRECONDITIONING[family].items()}
    if momentum is not None:
        return {"class": f"FDM_{name}", **fields, "fdm_multiplier": momentum.multiplier}
    if family == "edm":  # its range is that of momentum's clock here; there, without momentum, 0 to infinity
        fields = {"sigma_data": fields["sigma_data"]}
    return {"class": name, **fields}


def _read_description(path: Path) -> dict[str, Any]:
    beside = path.with_name(f"{path.name}.json")
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    try:
        description = json.loads(beside.read_text())
    except FileNotFoundError:
        raise UserError(f"{beside}, which describes {path.name}, is missing: keep the two together.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{beside} cannot be read: {error}.") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise UserError(f"{beside} is not the description of a file that `fdm export` wrote.")
    return description


def _load_torch(path: Path) -> Mapping[str, np.ndarray]:
    state = import_torch("read a .pt file").load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def _save_torch(state: Mapping[str, np.ndarray], path: Path) -> None:
    torch = import_torch("write a .pt file")
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in state.items()}, path)
