"""The U-Nets: DDPM++ and NCSN++ as one Flax module, :class:`SongUNet`."""

from fdm_jax.networks.song_unet import PRESETS, SongUNet

__all__ = ["PRESETS", "SongUNet"]
