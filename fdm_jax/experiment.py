"""From a configuration to the parts of a run.  The only module that reads a ConfigDict's fields."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from fdm_jax.augment import NUM_LABELS
from fdm_jax.data.opening import open_source
from fdm_jax.data.sources import MAX_READERS, DataSpec, Source
from fdm_jax.defaults import flatten
from fdm_jax.errors import UserError, nearest
from fdm_jax.families import Family, make_family
from fdm_jax.momentum import Momentum
from fdm_jax.networks import SongUNet
from fdm_jax.sampling.generate import GenerateFn, ModelDenoiser, make_generate_fn, make_model_denoiser
from fdm_jax.sampling.grids import MAX_STEPS
from fdm_jax.sampling.seeds import choose_labels
from fdm_jax.training.parallel import Parallel, parallelise
from fdm_jax.training.step import TrainSpec, make_train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_MAX_SAMPLES = 10_000  # of a grid, which is sampled at once: a picture of 3,200 pixels and more

# What may differ between a run and its continuation: how long it goes, what it reports, where its data lies, and
# how its work is cut up, which changes numbers by rounding only.
FREE_FIELDS = (
    "init_from", "train.images", "train.accumulation", "train.max_bad_steps", "train.steps_at_once",
    "log.", "checkpoint.", "samples.", "eval.",
    "parallel", "remat", "network.attention",
    "data.source", "data.data_dir", "data.class_names", "data.cache_mb", "data.threads", "data.workers", "data.device_prefetch",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The parts of a run.

    Attributes:
      config: what they were made from, with the shape of the data filled in.
      family, network, spec: see there.
      image_shape: (H, W, C).
      num_classes: 0 for an unconditional run.
    """

    config: ConfigDict
    family: Family
    network: SongUNet
    spec: TrainSpec
    image_shape: tuple[int, int, int]
    num_classes: int

    @classmethod
    def from_config(cls, config: ConfigDict, data: DataSpec | None = None) -> Experiment:
        """Build the parts; nothing is compiled.

        Args:
          config: fields as in :func:`fdm_jax.defaults.default_config`.
          data: the data set's own shape, checked against the configuration's; without it the configuration
            must give the shape, or the data set is opened for it.

        Raises:
          UserError: a value that does not fit, naming its field.
        """
        if data is None and (config.data.resolution is None or config.data.channels is None or (
            config.data.class_conditional and config.data.num_classes is None
        )):  # fmt: skip
            data = open_data(config).spec
        shape = {field: getattr(config.data, field) for field in ("resolution", "channels", "num_classes")}
        if not config.data.class_conditional:
            shape["num_classes"] = 0
        if data is not None:
            for field, wanted in shape.items():
                found = getattr(data, field)
                # Fewer classes than the network has are fine: a subset may lack the last ones.
                if wanted is not None and (found > wanted if field == "num_classes" else found != wanted):
                    raise UserError(
                        f"data.{field} is {wanted}, but {config.data.source} has {found}: set --config.data.{field}={found}."
                    )
                shape[field] = found if wanted is None else wanted
        if config.data.class_conditional and shape["num_classes"] < 1:
            raise UserError(
                f"data.class_conditional is True, but {config.data.source} has no classes: "
                "set --config.data.class_conditional=False."
            )
        config = config.copy_and_resolve_references()
        names = config.data.class_names or (data.class_names if data is not None else None) or ()
        if not config.data.class_conditional:
            config.data.update(shape | {"num_classes": None, "class_names": ()})
        elif len(names) > shape["num_classes"] or len(set(names)) < len(names):
            raise UserError(
                f"data.class_names must be {shape['num_classes']} different names, and is {', '.join(map(str, names))}."
            )
        else:
            config.data.update(shape | {"class_names": names})
        image_shape = (shape["resolution"], shape["resolution"], shape["channels"])
        spec = _train_spec(config, shape["num_classes"])
        if config.network.dtype not in DTYPES:
            raise UserError(f"network.dtype is {config.network.dtype!r}: {nearest(config.network.dtype, DTYPES)}")
        if config.init_from is not None and not config.init_from.strip():
            raise UserError("init_from is empty; if it is a variable of the shell, it is not set.")
        if spec.augment_probability > 0 and config.augment.labels is False:
            raise UserError("augment.labels is False, but without its labels augmentation would leak into the samples.")
        takes_augment_labels = config.augment.labels or spec.augment_probability > 0
        network = SongUNet(
            resolution=shape["resolution"],
            channels=shape["channels"],
            label_dim=shape["num_classes"],
            augment_dim=NUM_LABELS if takes_augment_labels else 0,
            **{k: v for k, v in config.network.items() if k != "dtype"},
            dtype=DTYPES[config.network.dtype],
            remat=config.remat,
        )
        momentum = Momentum(multiplier=config.momentum.multiplier) if config.momentum.enabled else None
        fields = {k: v for k, v in config.family.items() if k != "name"}
        return cls(
            config,
            make_family(config.family.name, momentum, **fields),
            network,
            spec,
            image_shape,
            shape["num_classes"],
        )

    def choose_labels(self, chosen: Any, seeds: np.ndarray) -> np.ndarray:
        """The class of each seed: :func:`fdm_jax.sampling.seeds.choose_labels`, which knows the names of its data's."""
        return choose_labels(chosen, seeds, self.num_classes, self.config.data.class_names)

    def model_denoiser(self, **options: Any) -> ModelDenoiser:
        """D(x; sigma) of its model: :func:`~fdm_jax.sampling.generate.make_model_denoiser`, which takes the options."""
        return make_model_denoiser(self.network, self.family, self.num_classes, **options)

    def generate_fn(self, **options: Any) -> GenerateFn:
        """A sampler of its model, of ``samples.steps`` if the options name no other number.

        They are those of :func:`~fdm_jax.sampling.generate.make_generate_fn`.
        """
        options = {"steps": self.config.samples.steps} | options
        return make_generate_fn(self.network, self.family, self.image_shape, self.num_classes, **options)

    def parallelised(self, mesh: Mesh) -> Parallel:
        """Its train step, on the devices of a mesh, as ``parallel`` says."""
        return parallelise(
            self.config.parallel,
            lambda axis: make_train_step(self.network, self.family, self.spec, axis=axis),
            mesh,
        )

    def sample_grid(self) -> tuple[int, int]:
        """Rows and columns of a run's pictures of samples; a column per class, if there are classes.

        Raises:
          UserError: they are too many to be sampled at once.
        """
        rows, columns = self.config.samples.rows, self.config.samples.columns
        if self.num_classes:
            columns = min(columns, self.num_classes)
        if rows * columns > _MAX_SAMPLES:
            raise UserError(
                f"samples.rows = {rows} times {columns} columns must be at most {_MAX_SAMPLES:,} images: lower "
                "samples.rows or samples.columns."
            )
        return rows, columns

    def check_devices(self, devices: int) -> None:
        """Raise a UserError unless a round's batch can be dealt to so many devices."""
        batch, rounds = self.spec.batch_size, self.spec.accumulation
        if batch % (devices * rounds):
            raise UserError(
                f"train.batch_size is {batch}, and must divide by {devices} device(s) times {rounds} round(s) of "
                f"train.accumulation; {max(batch // (devices * rounds), 1) * devices * rounds} would."
            )


def _train_spec(config: ConfigDict, num_classes: int) -> TrainSpec:
    train = config.train
    for name, least in (
        ("train.images", 1), ("train.batch_size", 1), ("train.accumulation", 1), ("train.learning_rate", 0),
        ("train.lr_rampup_images", 0), ("train.ema_halflife_images", 0), ("train.ema_rampup_ratio", 0),
        ("train.max_bad_steps", 1), ("train.steps_at_once", 1),
        ("warmup_steps", 0), ("seed", 0), ("log.every_images", 1), ("checkpoint.every_images", 1),
        ("checkpoint.keep_latest", 1), ("checkpoint.keep_every_images", 1), ("samples.every_images", 0),
        ("samples.columns", 1), ("samples.rows", 1), ("samples.steps", 1), ("data.threads", 1),
        ("data.workers", 0), ("data.device_prefetch", 0), ("eval.every_images", 0), ("eval.held_out_images", 1),
        ("eval.num_images", 2), ("eval.batch_size", 1),
    ):  # fmt: skip
        value = _field(config, name)
        if not least <= value < math.inf:
            wanted = "finite" if value >= least else f"{least} or more"
            raise UserError(f"{name} must be {wanted}, and is {value}.")
    # Signed and unsigned numbers of 32 bits on the devices; an image that is generated has a seed.
    for name, bits in (("seed", 31), ("warmup_steps", 31), ("eval.num_images", 32), ("data.num_classes", 31)):
        if (value := _field(config, name) or 0) >= 2**bits:  # without classes it is None
            raise UserError(f"{name} must be below 2^{bits}, and is {value}.")
    for name, most in (("data.threads", MAX_READERS), ("data.workers", MAX_READERS), ("samples.steps", MAX_STEPS)):
        if (value := _field(config, name)) > most:
            raise UserError(f"{name} must be at most {most}, and is {value}.")
    if not 0 <= config.augment.probability <= 1:
        raise UserError(f"augment.probability must be from 0 to 1, and is {config.augment.probability}.")
    return TrainSpec(
        batch_size=train.batch_size,
        accumulation=train.accumulation,
        learning_rate=train.learning_rate,
        lr_rampup_images=train.lr_rampup_images,
        ema_halflife_images=train.ema_halflife_images,
        ema_rampup_ratio=train.ema_rampup_ratio,
        warmup_steps=config.warmup_steps,
        augment_probability=config.augment.probability,
        num_classes=num_classes,
        seed=config.seed,
    )


def _field(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def open_data(config: ConfigDict, split: str | None = None, source: str | None = None) -> Source:
    """The data set of a configuration; ``split`` and ``source`` replace the configured ones.

    Mirrored copies (``data.xflip``) and a subset (``data.max_images``) are for training, and not in another ``split``.

    Raises:
      UserError: see :func:`fdm_jax.data.opening.open_source`.
    """
    data = config.data
    return open_source(
        source or data.source,
        split=split or data.split,
        data_dir=data.data_dir,
        use_labels=data.class_conditional,
        xflip=data.xflip and split is None,
        max_images=data.max_images if split is None else None,
        seed=config.seed,
        cache_mb=0 if data.workers else data.cache_mb,  # each worker would have a cache of its own
    )


def differing_fields(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Fields, with both values, that keep run ``b`` from continuing run ``a``; arguments as of ``config.to_dict()``."""
    flat_a, flat_b = flatten(json.loads(json.dumps(a))), flatten(json.loads(json.dumps(b)))
    # A field that an earlier version did not have is like one that is not set.
    return [
        f"{name} ({_shown(flat_a.get(name))} there, {_shown(flat_b.get(name))} here)"
        for name in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(name) != flat_b.get(name) and not name.startswith(FREE_FIELDS)
    ]


def _shown(value: Any) -> str:
    return "(not set)" if value is None else str(value)
