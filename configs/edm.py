"""EDM with momentum (EDM-FDM) on DDPM++; --config.momentum.enabled=False is plain EDM.

    fdm dataset prepare cifar10 --source=cifar-10-python.tar.gz
    fdm train --config=configs/edm.py:cifar10 --workdir=runs/cifar10-edm-fdm

Expected FID after 200 Mimg as published, EDM-FDM (plain EDM): CIFAR-10 1.79 (1.88) at 35 NFE, FFHQ 64x64 2.59 (2.65),
AFHQv2 64x64 1.93 (2.37) at 79 NFE.  `fdm plan` with the same arguments says what a run needs.
The digits take one to two minutes on two CPU cores.
"""

from fdm_jax.defaults import recipe

# data set: warm-up steps, multiplier of momentum
MOMENTUM = {"cifar10": (200, 2.0), "ffhq64": (800, 1.0), "afhqv2": (400, 2.0), "digits": (200, 2.0)}


def get_config(dataset: str = "cifar10"):
    """The recipe for cifar10, ffhq64, afhqv2 or digits."""
    config = recipe(dataset)
    config.family.update(name="edm", sigma_data=0.5, P_mean=-1.2, P_std=1.2)
    config.warmup_steps, config.momentum.multiplier = MOMENTUM[dataset]
    if dataset == "cifar10":
        config.network.channel_mult = (2, 2, 2)
    return config
