"""Fast Diffusion Model (Wu et al., arXiv 2306.06991) in JAX and Flax.

The core, from the idea outwards: :mod:`fdm_jax.momentum` (the damped oscillator and its scale s),
:mod:`fdm_jax.families` (VP, VE, EDM), :mod:`fdm_jax.denoiser`, :mod:`fdm_jax.objective`,
:mod:`fdm_jax.networks`, :mod:`fdm_jax.sampling`.  Everything there is pure functions of arrays.
A trained model is had with :func:`fdm_jax.interop.load_model`.
"""

__version__ = "0.1.0"
