"""Guidance: from denoisers to a denoiser.  D_guided = D_other + scale (D - D_other), in a range of noise levels.

With D_other the model without its class this is classifier-free guidance (Ho and Salimans, arXiv 2207.12598); with D_other a
worse model it is autoguidance (Karras et al., arXiv 2406.02507); the range is that of Kynkaanniemi et al. (arXiv 2404.07724).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fdm_jax.denoiser import DenoiseFn
from fdm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, and where.

    Attributes:
      scale: 1 is no guidance, 0 the other model alone.
      lowest, highest: guidance acts where lowest < sigma <= highest.

    Raises:
      UserError: a range that is none, or a scale that is not finite.
    """

    scale: float = 1.0
    lowest: float = 0.0
    highest: float = math.inf

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UserError(f"The guidance scale must be a finite number, and is {self.scale}.")
        if not 0 <= self.lowest < self.highest:
            raise UserError(
                f"Guidance must act from a lower to a higher noise level, and not {self.lowest} to {self.highest}."
            )

    def __call__(
        self, denoise_fn: DenoiseFn, both: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    ) -> DenoiseFn:
        """The guided denoiser.

        Args:
          denoise_fn: D, for the noise levels where nothing guides; there the other model is not run.
          both: (x, sigma) -> D and D_other, so that one forward pass can give the two.

        Returns:
          D_guided(x, sigma) for a scalar sigma.
        """

        def guided(x: jax.Array, sigma: jax.Array, /) -> jax.Array:
            def guide() -> jax.Array:
                D, other = both(x, sigma)
                return other + self.scale * (D - other)

            sigma = jnp.asarray(sigma)
            if self.lowest == 0 and math.isinf(self.highest):
                return guide()
            inside = (self.lowest < sigma) & (sigma <= self.highest)
            return jax.lax.cond(inside, guide, lambda: denoise_fn(x, sigma))

        return guided


def with_and_without_class(
    denoise: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], class_labels: jax.Array
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """(x, sigma) -> D with the classes and D with none, in one pass over a batch of twice the size.

    Args:
      denoise: D(x [2 B, H, W, C], sigma, class_labels [2 B, K]).
      class_labels: one-hot [B, K]; a row of zeros is "no class".
    """
    labels = jnp.concatenate([class_labels, jnp.zeros_like(class_labels)])

    def both(x: jax.Array, sigma: jax.Array) -> tuple[jax.Array, jax.Array]:
        D, other = jnp.split(denoise(jnp.concatenate([x, x]), sigma, labels), 2)
        return D, other

    return both
