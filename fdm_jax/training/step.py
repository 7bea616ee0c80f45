"""One optimiser step as a pure function: (state, batch) -> (state, metrics).

Every random number of a step is a function of (seed, step, index of the example in the global batch), so the
curve of a run depends neither on how many devices or processes share the batch nor on how many accumulation
rounds cut it, and a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from fdm_jax import augment
from fdm_jax.denoiser import make_denoise_fn
from fdm_jax.errors import UserError
from fdm_jax.families import Family
from fdm_jax.objective import clamp, denoising_loss, loss_weight
from fdm_jax.sampling.seeds import GENERATOR
from fdm_jax.training.axis import Axis, total
from fdm_jax.training.schedules import ema_beta, images_after, learning_rate

# Whether rounds of accumulation can do without a loop on CPUs.  Before jax 0.11.2 XLA forgets barriers too early, and
# rounds without a loop would take as much memory as one (seen in 0.10.2 and 0.11.0).
ROUNDS_WITHOUT_LOOP = jax.__version_info__ >= (0, 11, 2)

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step, and all that a checkpoint holds of it.

    Attributes:
      step: optimiser steps done, int32.
      params: of the network, float32.
      constants: of the network, not trained (NCSN++'s Fourier frequencies); {} if it has none.
      ema: running average of the parameters.
      opt_state: of the optimiser.
      bad_steps: steps in a row that ended with a gradient that was not finite, int32.
    """

    step: jax.Array
    params: Any
    constants: Any
    ema: Any
    opt_state: optax.OptState
    bad_steps: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """The constants of a training run.  Everything is counted in images except the warm-up, which counts steps.

    Attributes:
      batch_size: images per optimiser step, over all devices and accumulation rounds.
      accumulation: rounds that a step's batch is cut into.
      learning_rate, lr_rampup_images: see :func:`~fdm_jax.training.schedules.learning_rate`.
      ema_halflife_images, ema_rampup_ratio: see :func:`~fdm_jax.training.schedules.ema_beta`.
      warmup_steps: of the loss weight, see :func:`~fdm_jax.objective.clamp`.
      augment_probability: of each augmentation; 0 for none.
      num_classes: width of the one-hot labels; 0 for an unconditional run.
      seed: of all that is drawn.
    """

    batch_size: int
    learning_rate: float
    lr_rampup_images: float = 10_000_000
    accumulation: int = 1
    ema_halflife_images: float = 500_000
    ema_rampup_ratio: float | None = 0.05
    warmup_steps: int = 0
    augment_probability: float = 0.0
    num_classes: int = 0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    seed: int = 0

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with the rate ramped by images."""
        return optax.adam(
            lambda count: learning_rate(
                images_after(count, self.batch_size), self.learning_rate, self.lr_rampup_images
            ),
            b1=self.adam_b1,
            b2=self.adam_b2,
            eps=self.adam_eps,
        )


class Draws(NamedTuple):
    """The random numbers of a batch: sigma's draw [B], noise [B, H, W, C], keys [B] for dropout and augmentation."""

    sigma: jax.Array
    noise: jax.Array
    dropout_keys: jax.Array
    augment_keys: jax.Array


def draw_for_examples(
    family: Family, seed: int, step: jax.Array, index: jax.Array, image_shape: tuple[int, ...]
) -> Draws:
    """The draws of the examples at places ``index`` [B] of the global batch of a step."""
    step_key = jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), step)

    def one(i: jax.Array) -> Draws:
        sigma, noise, drop, aug = jax.random.split(jax.random.fold_in(step_key, i), 4)
        return Draws(family.training_draw(sigma), jax.random.normal(noise, image_shape, jnp.float32), drop, aug)

    return jax.vmap(one)(index)


def sanitise(gradients: Any) -> tuple[Any, Any]:
    """NaN -> 0 and +-inf -> +-1e5, and how many values of each array that were, int32."""
    # Counted as float32, exact up to 2^24 in one array: XLA joins a sum of integers to no other pass over the values.
    counts = jax.tree.map(lambda g: jnp.sum(jnp.where(jnp.isfinite(g), 0.0, 1.0)).astype(jnp.int32), gradients)
    return jax.tree.map(lambda g: jnp.nan_to_num(g, nan=0.0, posinf=1e5, neginf=-1e5), gradients), counts


def init_state(network: nn.Module, spec: TrainSpec, image_shape: tuple[int, ...]) -> TrainState:
    """The state before the first step; parameters drawn from ``spec.seed``.  Traceable.

    Args:
      network: a :class:`~fdm_jax.networks.SongUNet`.
      spec: gives seed and optimiser.
      image_shape: (H, W, C).
    """
    # A stream of its own: folding 2^32 - 1 in leaves all step numbers to the training draws.
    key = jax.random.fold_in(jax.random.key(spec.seed, impl=GENERATOR), 0xFFFFFFFF)
    variables = dict(network.init(key, jnp.zeros((1, *image_shape)), jnp.zeros(1)))
    params = variables.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        constants=variables,
        ema=jax.tree.map(jnp.copy, params),  # a copy: donating one buffer twice is an error
        opt_state=spec.optimizer().init(params),
        bad_steps=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    network: nn.Module,
    family: Family,
    spec: TrainSpec,
    *,
    axis: Axis | None = None,
    draw_fn: Callable[[jax.Array, Batch], Draws] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Build the step.

    Args:
      network: F; called as network.apply({"params", ...}, x, c_noise, labels, augment_labels, dropout_keys=...).
      family: noise family, with or without momentum.
      spec: constants of the run.
      axis: the devices that share a batch, under ``jax.pmap`` or ``jax.shard_map``; None where it is whole.
      draw_fn: replaces the random draws (tests feed stored ones).

    Returns:
      train_step(state, batch).  The batch holds "image" (uint8 [B, H, W, C], or float32 in [-1, 1]), "label"
      (int32 [B], ignored by unconditional runs) and "index" (int32 [B], place in the global batch).  With an axis, B
      is the device's share.  Metrics are scalars: loss, grad_norm, learning_rate, clamp, ema_beta,
      bad_gradients (values that were not finite) and bad_steps (such steps in a row).

    Raises:
      UserError: from train_step, for a batch of another size than ``spec.batch_size``, or that the rounds do not divide, or
        of integers other than uint8.
    """
    optimizer = spec.optimizer()

    def check(batch: Batch) -> None:
        share, dtype = len(batch["image"]), batch["image"].dtype
        if dtype != jnp.uint8 and not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"Images must be uint8, or floats in [-1, 1], and these are {dtype}.")
        images = share if axis is None else share * jax.lax.psum(1, axis.name)
        if images != spec.batch_size:  # loss and gradients would be off by the ratio
            raise UserError(f"The batch has {images} images, and spec.batch_size is {spec.batch_size}.")
        if spec.accumulation < 1 or share % spec.accumulation:
            raise UserError(f"{share} images on a device cannot be cut into {spec.accumulation} rounds.")

    def loss_sum(params: Any, state: TrainState, batch: Batch) -> jax.Array:
        """Sum over a part of the batch of the weighted error."""
        images = batch["image"]
        if images.dtype == jnp.uint8:
            images = images.astype(jnp.float32) / 127.5 - 1
        if draw_fn is None:
            draws = draw_for_examples(family, spec.seed, state.step, batch["index"], images.shape[1:])
        else:
            draws = draw_fn(state.step, batch)
        augment_labels = None
        if spec.augment_probability > 0:
            images, augment_labels = augment.augment_with_keys(draws.augment_keys, images, spec.augment_probability)
        class_labels = jax.nn.one_hot(batch["label"], spec.num_classes) if spec.num_classes else None
        whole = params if axis is None else axis.gather(params, network.dtype)
        variables = {"params": whole, **state.constants}

        def apply(x: jax.Array, c_noise: jax.Array) -> jax.Array:
            return network.apply(  # type: ignore[return-value]
                variables, x, c_noise, class_labels, augment_labels, dropout_keys=draws.dropout_keys
            )

        sigma = family.training_sigma(draws.sigma)
        weight = loss_weight(family, sigma, state.step, spec.warmup_steps)
        return jnp.sum(denoising_loss(make_denoise_fn(family, apply), images, sigma, draws.noise, weight))

    def loss_and_gradients(state: TrainState, batch: Batch) -> tuple[jax.Array, Any]:
        value_and_grad = jax.value_and_grad(loss_sum)
        if spec.accumulation == 1:
            return value_and_grad(state.params, state, batch)
        # Round r takes every spec.accumulation-th example, so that each device works on its own examples only.
        rounds = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(-1, spec.accumulation, *a.shape[1:]), 1, 0), dict(batch))

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(state.params, state, part)), None

        def add_in_turn(total: Any, part: Batch) -> tuple[Any, None]:
            total, part = jax.lax.optimization_barrier((total, part))  # or rounds would share the time, and the memory
            return add(total, part)

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        loop = functools.partial(jax.lax.scan, add)
        # Without a loop on CPUs, where inside of one the gradients of convolutions take 20 to 45 times as long: only outside
        # does XLA bring them into the form that its library for them takes (jax issue 12868).
        on_cpu = functools.partial(jax.lax.scan, add_in_turn, unroll=True) if ROUNDS_WITHOUT_LOOP else loop
        total, _ = jax.lax.platform_dependent(zero, rounds, cpu=on_cpu, default=loop)
        return total

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        check(batch)
        loss, gradients = jax.tree.map(lambda a: a / spec.batch_size, loss_and_gradients(state, batch))
        if axis is not None:
            loss, gradients = axis.sum(loss, gradients)
        total_of = total if axis is None else axis.total
        gradients, bad = sanitise(gradients)
        bad_gradients = total_of(bad)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        nimg = images_after(state.step, spec.batch_size)
        beta = ema_beta(nimg, spec.batch_size, spec.ema_halflife_images, spec.ema_rampup_ratio)
        bad_steps = jnp.where(bad_gradients > 0, state.bad_steps + 1, 0)
        metrics = {
            "loss": loss,
            "grad_norm": jnp.sqrt(total_of(jax.tree.map(lambda g: jnp.sum(jnp.square(g)), gradients))),
            "learning_rate": learning_rate(nimg, spec.learning_rate, spec.lr_rampup_images),
            "clamp": clamp(state.step, spec.warmup_steps),
            "ema_beta": beta,
            "bad_gradients": bad_gradients,
            "bad_steps": bad_steps,
        }
        state = state.replace(
            step=state.step + 1,
            params=params,
            ema=jax.tree.map(lambda p, e: p + beta * (e - p), params, state.ema),
            opt_state=opt_state,
            bad_steps=bad_steps,
        )
        return state, metrics

    return train_step
