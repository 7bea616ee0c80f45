"""A trained model for programs of one's own: D(x; sigma), and images from seeds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdm_jax.defaults import from_dict
from fdm_jax.denoiser import make_denoise_fn
from fdm_jax.devices import make_mesh
from fdm_jax.experiment import Experiment
from fdm_jax.families import Family
from fdm_jax.host_memory import program_check
from fdm_jax.networks import SongUNet
from fdm_jax.sampling import seeds as draws
from fdm_jax.sampling.generate import BatchedGenerator
from fdm_jax.training.agreement import all_or_none
from fdm_jax.training.checkpoints import Checkpoints, check_alike, read_config


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained denoiser.

    Attributes:
      experiment: what its configuration builds.
      variables: {"params": ..., and "constants" for NCSN++} of float32 arrays, as ``network.apply`` takes them.
      checkpoint: the optimiser step that they are from; None if they are from a file of another kind.
    """

    experiment: Experiment
    variables: Mapping[str, Any]
    checkpoint: int | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], variables: Mapping[str, Any], checkpoint: int | None = None) -> Model:
        """Builds the parts.

        Args:
          config: fields of a configuration by group; those left out have their defaults.
          variables, checkpoint: see above.

        Raises:
          UserError: a value that does not fit.
        """
        experiment = Experiment.from_config(from_dict(config))
        network = experiment.network.clone(attention="auto")  # the run's way to compute it may not be this machine's
        return cls(dataclasses.replace(experiment, network=network), variables, checkpoint)

    def checked(self) -> Model:
        """This model, if its variables are those of its network.

        Raises:
          UserError: one is missing, left over, or of another shape.
        """
        images = jnp.zeros((1, *self.experiment.image_shape))
        wanted = jax.eval_shape(self.network.init, jax.random.key(0), images, jnp.zeros(1))
        check_alike(self.variables, wanted, "the network that it describes")
        return self

    @property
    def config(self) -> dict[str, Any]:
        """The fields of the configuration, by group."""
        return self.experiment.config.to_dict()

    @property
    def family(self) -> Family:
        """VP, VE or EDM, with its momentum."""
        return self.experiment.family

    @property
    def network(self) -> SongUNet:
        """F."""
        return self.experiment.network

    @functools.cached_property
    def _denoise(self) -> Callable[..., jax.Array]:
        family, network = self.family, self.network  # self would be a cycle, which keeps the variables for a while

        @jax.jit
        def denoise(variables: Any, *args: Any) -> jax.Array:
            return make_denoise_fn(family, functools.partial(network.apply, variables))(*args)

        return denoise

    def denoise(
        self,
        x: jax.Array,
        sigma: jax.Array | float,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
    ) -> jax.Array:
        """D(x; sigma), compiled.

        Args:
          x: y + sigma n, [B, H, W, C].
          sigma: a scalar or [B].
          class_labels: one-hot [B, label_dim]; None for no class.
          augment_labels: [B, 9]; None for not augmented.

        Returns:
          [B, H, W, C].
        """
        return self._denoise(self.variables, jnp.asarray(x), jnp.asarray(sigma), class_labels, augment_labels)

    def sampler(self, *, batch_size: int = 64, guide: Model | None = None, **options: Any) -> Callable[..., np.ndarray]:
        """Build sample(seeds, labels=None) -> images, uint8 [N, H, W, C]: those of ``fdm generate`` for the same seeds.

        It runs on all devices of this process, is compiled at its first call, and takes integers from 0 to 2^32 - 1 and
        a class, by number or name, for all of them, one for each, or none: then the seed draws it.

        Args:
          batch_size: images at a time, rounded up to a multiple of the devices.
          guide: a worse model to guide away from, with ``guidance`` among the options.
          options: of :func:`~fdm_jax.sampling.generate.make_generate_fn`: steps (by default the run's own), solver, grid,
            churn, guidance, ...

        Raises:
          UserError: what is asked for does not exist or does not fit; from ``sample``, a seed or class that does not.
          MemoryError: from ``sample``, on CPUs, a batch that the machine does not hold.
        """
        parts = (guide.network, guide.family) if guide is not None else None
        variables = (self.variables, guide.variables) if guide is not None else self.variables
        generate = self.experiment.generate_fn(guide=parts, **options)
        mesh = make_mesh(jax.local_devices())
        generator = BatchedGenerator(generate, mesh, batch_size, check=program_check())

        def sample(seeds: Sequence[int] | np.ndarray, labels: Any = None) -> np.ndarray:
            seeds = draws.as_seeds(seeds)
            labels = self.experiment.choose_labels(labels, seeds)
            return np.concatenate(list(generator(variables, seeds, labels)))

        return sample


def load_run(workdir: Path, checkpoint: int | str | None = None) -> Model:
    """The averaged weights of a run's checkpoint: of an optimiser step, the "best" one, or by default the newest.

    Raises:
      UserError: it is no workdir, or there is no such checkpoint.
    """
    with all_or_none(f"{workdir} is not the workdir of a run for another process, which says why."):
        read_config(workdir)  # says so if it is none
    step, variables, meta = Checkpoints(workdir / "checkpoints", read_only=True).restore_model(checkpoint)
    return Model.from_config(meta["config"], variables, step)
