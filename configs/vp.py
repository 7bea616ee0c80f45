"""VP with momentum (VP-FDM) on DDPM++; --config.momentum.enabled=False is plain VP.

    fdm dataset prepare cifar10 --source=cifar-10-python.tar.gz
    fdm train --config=configs/vp.py:cifar10 --workdir=runs/cifar10-vp-fdm

Expected FID after 200 Mimg as published, VP-FDM (plain VP): CIFAR-10 2.08 (2.15) at 35 NFE, FFHQ 64x64 2.43 (2.69),
AFHQv2 64x64 2.39 (2.61) at 79 NFE.  `fdm plan` with the same arguments says what a run needs.
"""

from fdm_jax.defaults import recipe

# data set: warm-up steps, multiplier of momentum
MOMENTUM = {"cifar10": (400, 2.0), "ffhq64": (400, 1.0), "afhqv2": (400, 2.0), "digits": (200, 2.0)}


def get_config(dataset: str = "cifar10"):
    """The recipe for cifar10, ffhq64, afhqv2 or digits."""
    config = recipe(dataset)
    config.family.update(name="vp")
    config.warmup_steps, config.momentum.multiplier = MOMENTUM[dataset]
    return config
