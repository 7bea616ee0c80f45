"""Every field of a configuration with its type, default and meaning, and the recipes of the paper's data sets.

A file of ``configs/`` starts from :func:`recipe` and sets what is its own.  Amounts of training are counted in
images; the warm-up of the loss weight alone counts optimiser steps.
"""

from __future__ import annotations

import json
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from fdm_jax.errors import UserError, nearest


def default_config() -> ConfigDict:
    """All fields.  Types are fixed by the values here; a field not named here does not exist."""
    config = ConfigDict()
    config.seed = 0  # of everything random: parameters, data order, noise
    config.parallel = "jit"  # how several devices are used: jit (over a mesh), fsdp (the state dealt out too) or pmap
    config.init_from = placeholder(str)  # a workdir whose averaged weights a new run starts from
    config.remat = ()  # resolutions whose blocks are computed again in the backward pass, to save memory: (32, 16)
    config.warmup_steps = 0  # FDM's loss-weight warm-up, in optimiser steps; 0: none

    config.family = ConfigDict()
    config.family.name = "edm"  # vp, ve or edm; the fields of fdm_jax.families follow where a config sets them

    config.momentum = ConfigDict()
    config.momentum.enabled = True  # FDM's momentum: the network is shown s(sigma) x; False is the plain baseline
    config.momentum.multiplier = 1.0  # m, speed of its clock

    config.network = ConfigDict()
    config.network.preset = "ddpmpp"  # ddpmpp or ncsnpp
    config.network.model_channels = 128
    config.network.channel_mult = (1, 2, 2, 2)  # channels of each level, finest first, in model_channels
    config.network.channel_mult_emb = 4  # width of the embedding, in model_channels
    config.network.num_blocks = 4  # residual blocks per level
    config.network.attn_resolutions = (16,)
    config.network.dropout = 0.1
    config.network.label_dropout = 0.0  # share of examples that are shown no class, for guidance
    config.network.dtype = "float32"  # compute type of the convolutions: float32 or bfloat16
    config.network.attention = "auto"  # how it is computed: auto, xla, or cudnn (NVIDIA GPUs, bfloat16)

    config.augment = ConfigDict()
    config.augment.probability = 0.0  # of each geometric augmentation; 0: none
    config.augment.labels = placeholder(bool)  # whether the network takes the labels; not set: if there is augmentation

    config.data = ConfigDict()
    config.data.source = "digits"  # the name of a prepared data set, or the path of one, of a zip or of a folder
    config.data.split = "train"  # train, test or all; of prepared sets also slices such as train[:1000]
    config.data.data_dir = placeholder(str)  # where named data sets are prepared; the user's cache by default
    config.data.class_conditional = True  # train on the labels
    config.data.resolution = placeholder(int)  # what the data must have; not set: what it has
    config.data.channels = placeholder(int)
    config.data.num_classes = placeholder(int)
    config.data.class_names = ()  # in the order of the classes; not set: what the data call them
    config.data.xflip = False  # every image also mirrored
    config.data.max_images = placeholder(int)  # a random subset, of training images alone
    config.data.cache_mb = 512  # keep decoded images in memory up to this size
    config.data.threads = 4  # batches read at the same time
    config.data.workers = 0  # processes that read instead of the threads
    config.data.device_prefetch = 2  # batches put on the devices ahead of the step that needs them

    config.train = ConfigDict()
    config.train.images = 200_000_000  # length of the run
    config.train.batch_size = 512  # per optimiser step, over all devices
    config.train.accumulation = 1  # rounds that a step's batch is cut into, to save memory
    config.train.learning_rate = 1e-3
    config.train.lr_rampup_images = 10_000_000.0
    config.train.ema_halflife_images = 500_000.0
    config.train.ema_rampup_ratio = 0.05  # half-life early on, as a share of the images seen
    config.train.steps_at_once = 1  # steps per program, where to launch one costs more than to run it (not on CPUs)
    config.train.max_bad_steps = 20  # stop after so many steps in a row with gradients that are not finite

    config.log = ConfigDict()
    config.log.every_images = 50_000

    config.checkpoint = ConfigDict()
    config.checkpoint.every_images = 2_500_000
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_every_images = 10_000_000  # these stay for good

    config.samples = ConfigDict()
    config.samples.every_images = 2_500_000  # a grid of samples from the EMA; 0: none
    config.samples.columns = 10  # one class per column if there are classes
    config.samples.rows = 8
    config.samples.steps = 18  # of the EDM sampler, NFE = 2 steps - 1

    config.eval = ConfigDict()  # of the EMA while training; the best checkpoint is kept beside the latest ones
    config.eval.every_images = 0  # how often; 0: not at all
    config.eval.held_out_split = "test"  # of the data, for the denoising error on images not trained on; "": none
    config.eval.held_out_source = placeholder(str)  # another data set for it
    config.eval.held_out_images = 1000  # at most
    config.eval.ref = placeholder(str)  # statistics of real images (`fdm evaluate ref`) to measure samples against
    config.eval.num_images = 2000  # samples
    config.eval.batch_size = 64  # of them at a time
    config.eval.extractor = placeholder(str)  # inception, classifier, dinov2 or pixels; not set: as the statistics say
    config.eval.weights = placeholder(str)  # of the extractor
    return config


# What the paper's runs share over the three families (arXiv 2306.06991, and its code's defaults).
RECIPES: dict[str, dict[str, object]] = {
    "cifar10": {
        "data.source": "cifar10", "data.resolution": 32, "data.channels": 3, "data.num_classes": 10,
        "network.dropout": 0.13, "augment.probability": 0.12,
        "train.batch_size": 512, "train.learning_rate": 1e-3, "samples.steps": 18,
    },
    "ffhq64": {
        "data.source": "ffhq64", "data.resolution": 64, "data.channels": 3, "data.class_conditional": False,
        "network.dropout": 0.05, "augment.probability": 0.15,
        "train.batch_size": 256, "train.learning_rate": 2e-4, "samples.steps": 40,
    },
    "afhqv2": {
        "data.source": "afhqv2", "data.split": "all",  # as in EDM, train and test together: 15,803 pictures
        "data.resolution": 64, "data.channels": 3, "data.class_conditional": False,
        "network.dropout": 0.25, "augment.probability": 0.15,
        "train.batch_size": 256, "train.learning_rate": 2e-4, "samples.steps": 40,
    },
    # A whole run in minutes on two cores: 8x8 images and a network of 180,000 parameters.
    "digits": {
        "data.source": "digits", "data.resolution": 8, "data.channels": 1, "data.num_classes": 10,
        "network.model_channels": 16, "network.channel_mult": (1, 2), "network.num_blocks": 1,
        "network.attn_resolutions": (), "network.dropout": 0.0,
        "train.images": 120_000, "train.batch_size": 64, "train.learning_rate": 2e-3,
        "train.lr_rampup_images": 5_000.0, "train.ema_halflife_images": 5_000.0,
        "log.every_images": 4_000, "checkpoint.every_images": 20_000, "checkpoint.keep_every_images": 40_000,
        "samples.every_images": 40_000, "eval.every_images": 20_000,
    },
}  # fmt: skip


def recipe(dataset: str) -> ConfigDict:
    """The configuration that the three families share for a data set.

    Raises:
      UserError: an unknown data set.
    """
    if dataset not in RECIPES:
        raise UserError(f"There is no recipe for the data set {dataset!r}: {nearest(dataset, RECIPES)}")
    config = default_config()
    config.update_from_flattened_dict(RECIPES[dataset])
    return config


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """The names of all fields, such as "train.batch_size"."""
    names: list[str] = []
    for key, value in config.items():
        names += field_names(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [prefix + key]
    return names


def to_json(config: ConfigDict) -> str:
    """The whole configuration as text."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_dict(fields: dict[str, Any]) -> ConfigDict:
    """A configuration from the dict that its text holds; families bring fields of their own."""
    config = default_config()
    family = ConfigDict(fields.get("family", {}))
    config.family = family
    known = set(field_names(config))
    flat = {name: value for name, value in flatten(fields).items() if not name.startswith("family.")}
    for name, value in flat.items():
        if name not in known:
            raise UserError(f"The saved configuration has a field {name!r} that this version of fdm_jax does not know.")
        if value is not None:
            try:
                config.update_from_flattened_dict({name: tuple(value) if isinstance(value, list) else value})
            except TypeError as error:
                raise UserError(
                    f"The saved configuration has {value!r} for {name}, which is of another type."
                ) from error
    return config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"images": 1}} -> {"train.images": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
