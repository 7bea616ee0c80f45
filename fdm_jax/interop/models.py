"""Models of the PyTorch original as ours: the configuration, the family and the variables that a snapshot describes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fdm_jax.augment import NUM_LABELS
from fdm_jax.errors import UserError
from fdm_jax.interop.snapshots import Persistent, Snapshot, read_snapshot, submodule, tensors
from fdm_jax.interop.state_dict import from_torch
from fdm_jax.model import Model
from fdm_jax.networks.song_unet import PRESETS

# Positional parameters of the original's constructors, and what they default to.
_NETWORK_ARGUMENTS: dict[str, Any] = {
    "img_resolution": None, "in_channels": None, "out_channels": None, "label_dim": 0, "augment_dim": 0,
    "model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4, "num_blocks": 4,
    "attn_resolutions": [16], "dropout": 0.10, "label_dropout": 0, "embedding_type": "positional",
    "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1],
}  # fmt: skip
_FAMILIES = {"VPPrecond": "vp", "VEPrecond": "ve", "EDMPrecond": "edm"}
# Arguments of the original's classes around the network, which keep them as attributes, and our names.
PRECONDITIONING = {
    "vp": {"beta_d": "beta_d", "beta_min": "beta_min", "epsilon_t": "epsilon_t", "M": "num_scales"},
    "ve": {"sigma_min": "lowest", "sigma_max": "highest"},
    "edm": {"sigma_data": "sigma_data", "sigma_min": "lowest", "sigma_max": "highest"},
}


def load_snapshot(path: str | Path, load_storage: Callable[[bytes], np.ndarray] | None = None) -> Model:
    """A snapshot of FDM or EDM (``network-snapshot-*.pkl``) as a model; nothing in the file is executed.

    Args:
      path: the file.
      load_storage: see :func:`fdm_jax.interop.snapshots.read_snapshot`.

    Raises:
      UserError: see there; or the network is of another architecture, or its tensors do not fit.
    """
    path = Path(path)
    snapshot = read_snapshot(path, load_storage)
    try:
        return Model.from_config(config_of(snapshot), from_torch(tensors(snapshot.ema))).checked()
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    except Exception as error:  # values of the wrong kind in a description, each with an error of its own
        reason = " ".join(f"{error}".split())[:150]
        raise UserError(f"{path} cannot be used, for its description of the model does not fit ({reason}).") from error


def config_of(snapshot: Snapshot) -> dict[str, Any]:
    """The fields of a configuration, by group, that a snapshot's network, family and training come from.

    Raises:
      UserError: an architecture that is not here, or a value that is not understood.
    """
    ema = snapshot.ema
    name = ema.class_name
    plain = name.removeprefix("FDM_")
    if plain not in _FAMILIES:
        raise UserError(f"its network is a {name:.60}, and {', '.join(_FAMILIES)} with or without FDM_ are known.")
    config = _network(ema) | {"family": _family(_FAMILIES[plain], ema)}
    config["momentum"] = _momentum(_FAMILIES[plain], ema) if plain != name else {"enabled": False}
    if snapshot.loss is not None:
        config["warmup_steps"] = int(snapshot.loss.state.get("warmup_ite") or 0)
        for field in ("P_mean", "P_std"):
            if plain == "EDMPrecond" and field in snapshot.loss.state:
                config["family"][field] = float(snapshot.loss.state[field])
    if snapshot.augment is not None and config["augment"]["labels"]:
        config["augment"]["probability"] = float(snapshot.augment.state.get("p", 0.0))
    return config


def _network(ema: Persistent) -> dict[str, Any]:
    model = submodule(ema, "model")
    if model is None or model.class_name != "SongUNet":
        kind = model.class_name if model is not None else "network of an unknown kind"
        raise UserError(f"it holds a {kind:.60}; SongUNet (DDPM++, NCSN++) is what there is here, not ADM.")
    given = dict(zip(_NETWORK_ARGUMENTS, model.state.get("_init_args") or (), strict=False)) | model.arguments
    unknown = [field for field in given if field not in _NETWORK_ARGUMENTS]
    if unknown:
        raise UserError(f"its network was made with {unknown[0]!r:.60}, which SongUNet does not have.")
    for field, value in given.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(each, (int, float, str)) for each in values):  # lists in lists may be endless to compare
            raise UserError(
                f"its {field} is {reprlib.repr(value):.60}, and a number, a text or a list of them is taken."
            )
    arguments = _NETWORK_ARGUMENTS | given
    if arguments["in_channels"] != arguments["out_channels"]:
        raise UserError("its network gives another number of channels than it takes.")
    # Far beyond any real network: building one of a billion blocks, to compare shapes, would not end.
    limits = {"img_resolution": 8192, "model_channels": 8192, "num_blocks": 64, "channel_mult_emb": 64}
    for field, most in limits.items():
        if not 1 <= arguments[field] <= most:
            raise UserError(f"its {field} is {arguments[field]!r:.20}, and 1 to {most} are taken.")
    if not 1 <= len(arguments["channel_mult"]) <= 10:
        raise UserError(f"its network has {len(arguments['channel_mult'])} levels, and 1 to 10 are taken.")
    parts = {
        "embedding": arguments["embedding_type"],
        "channel_mult_noise": arguments["channel_mult_noise"],
        "residual": {"standard": False, "residual": True}.get(arguments["encoder_type"]),
        "resample_filter": tuple(arguments["resample_filter"]),
    }
    presets = [preset for preset, fields in PRESETS.items() if fields == parts]
    if not presets or arguments["decoder_type"] != "standard":
        raise UserError(
            f"its network is neither DDPM++ nor NCSN++ ({str(parts):.200}, decoder {arguments['decoder_type']!r:.20})."
        )
    if arguments["augment_dim"] not in (0, NUM_LABELS):
        raise UserError(
            f"its network has {arguments['augment_dim']!r:.20} augment labels, and 0 or {NUM_LABELS} are known."
        )
    return {
        "network": {
            "preset": presets[0],
            "channel_mult": tuple(arguments["channel_mult"]),
            "attn_resolutions": tuple(arguments["attn_resolutions"]),
            "dropout": float(arguments["dropout"]),
            "label_dropout": float(arguments["label_dropout"]),
            **{field: int(arguments[field]) for field in ("model_channels", "channel_mult_emb", "num_blocks")},
        },
        "data": {
            "source": "imported",
            "resolution": int(arguments["img_resolution"]),
            "channels": int(arguments["in_channels"]),
            "class_conditional": bool(arguments["label_dim"]),
            "num_classes": int(arguments["label_dim"]) or None,
        },
        "augment": {"labels": bool(arguments["augment_dim"])},
    }


def _family(name: str, ema: Persistent) -> dict[str, Any]:
    family: dict[str, Any] = {"name": name}
    for theirs, ours in PRECONDITIONING[name].items():
        value = ema.state.get(theirs)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"its {theirs} is no number.")
        # Plain EDM has no range (0 to infinity there); ours has one that only momentum's clock uses.
        if not (ours in ("lowest", "highest") and (value <= 0 or math.isinf(value))):
            family[ours] = int(value) if ours == "num_scales" else float(value)
    return family


def _momentum(family: str, ema: Persistent) -> dict[str, Any]:
    rates = {"fdm_beta_d": 19.9, "fdm_beta_min": 0.1}
    for field, known in rates.items():
        if ema.state.get(field, known) != known:
            raise UserError(
                f"its {field} is {reprlib.repr(ema.state[field]):.20}, and momentum with {known} is what there is here."
            )
    # The original's VE takes a multiplier and does not use it.
    multiplier = 1.0 if family == "ve" else ema.state.get("fdm_multiplier", 1.0)
    return {"enabled": True, "multiplier": float(multiplier)}
