"""Image files as bytes."""

import io

import numpy as np
import PIL.Image


def png(pixels: np.ndarray) -> bytes:
    """A grey [H, W] or RGB [H, W, 3] picture."""
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "png")
    return out.getvalue()
