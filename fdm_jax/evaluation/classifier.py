"""A small classifier of one's own data, whose last layer but one serves as features where Inception's weights are missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from fdm_jax.errors import UserError
from fdm_jax.evaluation.weights import sha256
from fdm_jax.whole_files import write_whole

FORMAT = "fdm_jax classifier 1"
WIDTH = 64  # of the features


class Network(nn.Module):
    """Convolutions that halve the image to 4x4 or less, then two dense layers; features of a deviation of about 1."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 or float [B, H, W, C] in 0 ... 255 -> features [B, 64] and logits [B, classes]."""
        x = images.astype(jnp.float32) / 127.5 - 1
        x = nn.silu(nn.Conv(32, (3, 3), name="conv0")(x))
        i = 0
        while i == 0 or x.shape[1] > 4:
            i += 1
            x = nn.silu(nn.Conv(min(32 * 2**i, 128), (3, 3), strides=2, name=f"conv{i}")(x))
        features = nn.silu(nn.Dense(WIDTH, name="features")(x.reshape(len(x), -1)))
        # Set after the fit, so that distances do not depend on how large the features happen to be.
        scale = self.param("scale", nn.initializers.ones, (WIDTH,))
        return features / scale, nn.Dense(self.classes, name="classes")(features)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A fitted network.

    Attributes:
      classes: of the data.
      image_shape: (H, W, C).
      data: name of the data.
      accuracy: share of held-out images that it reads right.
      params: of :class:`Network`.
    """

    classes: int
    image_shape: tuple[int, int, int]
    data: str
    accuracy: float
    params: Any

    def apply(self, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Features and logits; pure."""
        with jax.default_matmul_precision("highest"):  # distances are to be the same on every device
            return Network(self.classes).apply({"params": params}, images)  # type: ignore[return-value]


def fit(
    images: np.ndarray, labels: np.ndarray, held_out: tuple[np.ndarray, np.ndarray], data: str, *,
    steps: int = 1500, batch_size: int = 128, seed: int = 0, report: Callable[[int, float], None] = lambda *_: None,
) -> Classifier:  # fmt: skip
    """Train with Adam and a falling rate on images that are moved by up to an eighth of their size.

    Args:
      images: uint8 [N, H, W, C].
      labels: int [N].
      held_out: the same of images that are not trained on.
      data: its name, kept with the result.
      steps, batch_size, seed: of the training.
      report: called now and then with the steps done and the loss.

    Raises:
      UserError: fewer than two classes.
    """
    classes = int(labels.max(initial=-1)) + 1
    if classes < 2:
        raise UserError(f"A classifier needs images of two classes or more, and {data} has {classes}.")
    network, shape = Network(classes), images.shape[1:]

    def logits_of(params: Any, x: jax.Array) -> jax.Array:
        return network.apply({"params": params}, x)[1]  # type: ignore[index, return-value]

    params = network.init(jax.random.key(seed), jnp.zeros((1, *shape)))["params"]
    optimiser = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3)
    pad = max(shape[0] // 8, 1)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        offsets = jax.random.randint(key, (len(x), 2), 0, 2 * pad + 1)
        padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
        moved = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), shape))(padded, offsets)
        value, gradient = jax.value_and_grad(loss)(params, moved, y)
        updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    rng, state = np.random.default_rng(seed), optimiser.init(params)
    for i in range(steps):
        chosen = rng.integers(0, len(images), batch_size)
        key = jax.random.fold_in(jax.random.key(seed), i)
        params, state, value = step(params, state, images[chosen], labels[chosen].astype(np.int32), key)
        if (i + 1) % 100 == 0 or i + 1 == steps:
            report(i + 1, float(value))
    outputs = jax.jit(lambda x: network.apply({"params": params}, x)[0])
    features = np.concatenate([outputs(images[i : i + 256]) for i in range(0, len(images), 256)])
    params = params | {"scale": np.maximum(features.std(axis=0), 1e-6)}
    read = jax.jit(lambda x: logits_of(params, x).argmax(-1))
    parts = [np.asarray(read(held_out[0][i : i + 256])) for i in range(0, len(held_out[0]), 256)]
    accuracy = float(np.mean(np.concatenate(parts) == held_out[1]))
    return Classifier(classes, shape, data, accuracy, jax.tree.map(np.asarray, params))  # type: ignore[arg-type]


def save(classifier: Classifier, path: Path) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
      UserError: it cannot be written.
    """
    fields = {f.name: getattr(classifier, f.name) for f in dataclasses.fields(classifier) if f.name != "params"}
    tensors = {"/".join(name): np.asarray(value) for name, value in flatten_dict(classifier.params).items()}
    # One entry: safetensors writes several in any order, and the file's checksum stands for the classifier.
    content = safetensors.numpy.save(tensors, {"classifier": json.dumps({"format": FORMAT} | fields)})
    write_whole(path, lambda temporary: temporary.write_bytes(content))


def load(path: Path) -> Classifier:
    """Read what :func:`save` wrote.

    Raises:
      UserError: it is missing or something else.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            fields = json.loads(metadata.get("classifier", "{}"))
            if fields.pop("format", metadata.get("format")) != FORMAT:  # files of early versions have it beside
                raise UserError(
                    f"{path} (sha256 {sha256(path)}) is no classifier: `fdm evaluate fit-classifier` makes one."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape = tuple(fields["image_shape"])
        if len(shape) != 3 or not all(isinstance(n, int) and 0 < n < 2**16 for n in (*shape, fields["classes"])):
            raise ValueError(f"images of {shape}, {fields['classes']} classes")
        params = unflatten_dict({tuple(name.split("/")): value for name, value in tensors.items()})
        classifier = Classifier(**fields | {"image_shape": shape}, params=params)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} (sha256 {sha256(path)}) is no classifier, or damaged ({error}).") from error
    wanted = jax.eval_shape(
        lambda: Network(classifier.classes).init(jax.random.key(0), jnp.zeros((1, *classifier.image_shape)))["params"]
    )
    shapes = jax.tree.map(jnp.shape, (params, wanted))
    if shapes[0] != shapes[1]:
        raise UserError(f"{path} is damaged: its arrays are not those of a classifier of {classifier.image_shape}.")
    return classifier
