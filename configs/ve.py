"""VE with momentum (VE-FDM) on NCSN++; --config.momentum.enabled=False is plain VE.

    fdm dataset prepare cifar10 --source=cifar-10-python.tar.gz
    fdm train --config=configs/ve.py:cifar10 --workdir=runs/cifar10-ve-fdm

Expected FID after 200 Mimg as published, VE-FDM (plain VE): CIFAR-10 2.85 (3.09) at 35 NFE, FFHQ 64x64 3.04 (38.97),
AFHQv2 64x64 47.30 (57.48) at 79 NFE.  `fdm plan` with the same arguments says what a run needs.
"""

from fdm_jax.defaults import recipe

# data set: warm-up steps, multiplier of momentum
MOMENTUM = {"cifar10": (400, 1.0), "ffhq64": (400, 1.0), "afhqv2": (400, 1.0), "digits": (200, 1.0)}


def get_config(dataset: str = "cifar10"):
    """The recipe for cifar10, ffhq64, afhqv2 or digits."""
    config = recipe(dataset)
    config.family.update(name="ve")
    config.network.preset = "ncsnpp"
    config.warmup_steps, config.momentum.multiplier = MOMENTUM[dataset]
    return config
