"""Whole runs on the digits that the PyTorch original was run with too: `make fidelity` compares the two.

    fdm train --config=configs/digits_runs.py:edm_fdm --workdir=runs/digits-edm-fdm --config.seed=1

80,000 images, about a minute each on two CPU cores; DDPM++ for all families, VE included.
"""

from fdm_jax.defaults import recipe
from fdm_jax.errors import UserError, nearest

# variant: family, momentum, multiplier, warm-up steps
VARIANTS = {
    "edm": ("edm", False, 2.0, 0),
    "edm_w200": ("edm", False, 2.0, 200),
    "edm_fdm_w0": ("edm", True, 2.0, 0),
    "edm_fdm": ("edm", True, 2.0, 200),
    "edm_fdm_m1": ("edm", True, 1.0, 200),
    "vp": ("vp", False, 2.0, 0),
    "vp_fdm": ("vp", True, 2.0, 200),
    "ve": ("ve", False, 1.0, 0),
    "ve_fdm": ("ve", True, 1.0, 200),
}


def get_config(variant: str = "edm_fdm"):
    """The run called ``variant``."""
    if variant not in VARIANTS:
        raise UserError(f"There is no digits run {variant!r}: {nearest(variant, VARIANTS)}")
    config = recipe("digits")
    config.family.name, config.momentum.enabled, config.momentum.multiplier, config.warmup_steps = VARIANTS[variant]
    config.train.images = 80_000
    config.checkpoint.every_images = config.checkpoint.keep_every_images = 20_000
    config.samples.every_images = 0
    return config
