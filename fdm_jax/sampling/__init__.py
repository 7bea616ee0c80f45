"""Samplers: from noise to images by solving the probability-flow ODE (or SDE) of a denoiser.

Every sampler works on D(x; sigma) in sigma space; momentum lives inside D only.
"""

from fdm_jax.sampling.edm import Churn, edm_sample
from fdm_jax.sampling.grids import edm_sigmas, sampling_range

__all__ = ["Churn", "edm_sample", "edm_sigmas", "sampling_range"]
