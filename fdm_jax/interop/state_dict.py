"""The original's state-dict names and layouts, and ours.

    enc.16x16_block0.conv0.weight [O, I, kh, kw]   <->   enc_16x16_block0/conv0/kernel [kh, kw, I, O]
    map_layer0.weight [O, I]                       <->   map_layer0/kernel [I, O]
    dec.16x16_aux_norm.weight [C]                  <->   dec_16x16_aux_norm/scale [C]
    enc.16x16_block0.qkv.weight [3C, C, 1, 1]      <->   enc_16x16_block0/attention/qkv/kernel [1, 1, C, 3C]

The original interleaves q, k and v (channel 3 c + {0, 1, 2}); ours are three blocks of C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fdm_jax.errors import UserError

_IN_ATTENTION = ("norm2", "qkv", "proj")


def _path(name: str, ndim: int) -> tuple[str, ...]:
    """Our place of the original's parameter ``name``."""
    head, *rest = name.split(".")
    if head in ("enc", "dec") and rest:
        head, *rest = [f"{head}_{rest[0]}", *rest[1:]]
    if not rest:
        raise UserError(f"There is no module for the tensor {name:.60}.")
    if rest[0] in _IN_ATTENTION:
        rest = ["attention", *rest]
    leaf = "bias" if rest[-1] == "bias" else ("scale" if ndim == 1 else "kernel")
    return (head, *rest[:-1], leaf)


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of :class:`~fdm_jax.networks.SongUNet` from an original state dict.

    Args:
      state_dict: arrays under the original's names, with or without the leading ``model.``; resampling filters,
        which are no parameters, are passed over.

    Returns:
      {"params": ..., "constants": ...} of float32 NumPy arrays ("constants" only for NCSN++).

    Raises:
      UserError: a tensor of more dimensions than any parameter has, or outside of all modules.
    """
    variables: dict[str, Any] = {"params": {}}
    for full_name, value in state_dict.items():
        name = full_name.removeprefix("model.")
        value = np.asarray(value, np.float32)
        if name.endswith("resample_filter"):
            continue
        if name == "map_noise.freqs":
            variables["constants"] = {"map_noise": {"freqs": value}}
            continue
        if value.ndim not in (1, 2, 4):
            raise UserError(f"The tensor {full_name} has shape {value.shape}; 1, 2 or 4 dimensions were expected.")
        *parents, leaf = _path(name, value.ndim)
        if parents[-1] == "qkv":  # [3 c + j, ...] -> [j C + c, ...]
            value = value.reshape(-1, 3, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T  # OIHW -> HWIO, [O, I] -> [I, O]
        node = variables["params"]
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return variables


def to_torch(variables: Mapping[str, Any], resample_filter: Sequence[int]) -> dict[str, np.ndarray]:
    """The original's state dict of a :class:`~fdm_jax.networks.SongUNet`: the inverse of :func:`from_torch`.

    Args:
      variables: {"params": ..., and "constants" for NCSN++}.
      resample_filter: taps of the network's up- and downsampling, which the original keeps with its convolutions.

    Returns:
      float32 arrays under the original's names, without a leading ``model.``; its ``SongUNet`` loads them strictly.
    """
    state: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        *modules, kind = (str(key.key) for key in path)
        value = np.asarray(leaf)
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        if modules[-1] == "qkv":  # [j C + c, ...] -> [3 c + j, ...]
            value = value.reshape(3, -1, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)
        if modules[0].startswith(("enc_", "dec_")):
            modules = [modules[0][:3], modules[0][4:], *modules[1:]]
        prefix = ".".join(module for module in modules if module != "attention")
        state[f"{prefix}.{'bias' if kind == 'bias' else 'weight'}"] = np.ascontiguousarray(value)
        block = modules[1] if len(modules) > 1 else ""
        resamples = block.endswith(("_down", "_up")) and modules[-1] in ("conv0", "skip")
        if kind == "kernel" and (resamples or block.endswith("_aux_residual")):
            taps = np.outer(resample_filter, resample_filter).astype(np.float32)
            state[f"{prefix}.resample_filter"] = (taps / taps.sum())[None, None]
    if "constants" in variables:
        state["map_noise.freqs"] = np.asarray(variables["constants"]["map_noise"]["freqs"])
    return state
