"""From the bytes of an image file to ``uint8 [H, W, C]``, and to the size that is wanted.

:func:`decode_image` is for data sets that are read as they are: 8-bit grey and RGB and nothing else, pixels never
changed.  :func:`decode_picture` and :func:`fit` are for preparing a data set from pictures of all kinds.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps

from fdm_jax.errors import UserError
from fdm_jax.storage_errors import system_fails

PNG_HEADER_BYTES = 33  # signature and IHDR chunk
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
_PIL_COLOURS = {"P": "palette", "LA": "grey with alpha", "RGBA": "RGB with alpha"} | dict.fromkeys(
    ("1", "L", "I", "F"), "grey"
)
_PIL_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I;16N": 16, "I": 32, "F": 32}
_CHANNELS = {"grey": 1, "RGB": 3}
_PIL_MODES = {1: "L", 3: "RGB"}
_RAW_16_BITS = re.compile("I;16|;16[BLN]")  # in PNG and TIFF files, of which Pillow reads RGB as 8-bit without a word
# Those of Pillow's that pictures come in.  Others start programs (EPS Ghostscript), whatever the name of the file says.
_KINDS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
_MAX_PIXELS = 2**26  # more are a bomb, or no picture for a diffusion model
TRANSFORMS = ("none", "center-crop")


class ImageShape(NamedTuple):
    height: int
    width: int
    channels: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} with {self.channels} channel{'s' * (self.channels > 1)}"


def image_names(files: Iterable[str]) -> list[str]:
    """Those that end like a kind of image that can be read."""
    extensions = PIL.Image.registered_extensions()
    return [name for name in files if extensions.get(os.path.splitext(name)[1].lower()) in _KINDS]


def _shape(width: int, height: int, bits: int, colours: str, where: str) -> ImageShape:
    if colours not in _CHANNELS:
        raise UserError(f"{where} has {colours} pixels: convert it to grey (1 channel) or RGB (3 channels).")
    if bits != 8:
        raise UserError(f"{where} has {bits}-bit pixels: convert it to 8 bits per channel.")
    return ImageShape(height, width, _CHANNELS[colours])


def png_shape(head: bytes, where: str) -> ImageShape | None:
    """The shape that a PNG's first 33 bytes announce, or None if they are not those of a PNG.

    Pillow cannot be asked instead: it reads a 16-bit RGB file as 8-bit without a word.

    Raises:
      UserError: the pixels are not 8-bit grey or RGB; ``where`` names the file in the sentence.
    """
    if not head.startswith(_PNG_SIGNATURE) or head[12:16] != b"IHDR" or len(head) < PNG_HEADER_BYTES:
        return None
    width, height, bits, colour_type = struct.unpack(">IIBB", head[16:26])
    return _shape(width, height, bits, _PNG_COLOURS.get(colour_type, "unknown"), where)


def decode_image(data: bytes, where: str) -> np.ndarray:
    """Decodes one image file to uint8 [H, W, C], C being 1 or 3; ``where`` names it in an error.

    Raises:
      UserError: the bytes are no whole image, or its pixels are not 8-bit grey or RGB.
    """
    png_shape(data[:PNG_HEADER_BYTES], where)
    image = _open(data, where)
    mode = image.mode.partition(";")[0]
    bits = _PIL_BITS.get(image.mode, 8)
    shape = _shape(image.width, image.height, bits, _PIL_COLOURS.get(mode, mode), where)
    return np.array(image, np.uint8).reshape(shape)


def decode_picture(data: bytes, where: str, channels: int | None = None) -> np.ndarray:
    """Decodes a picture of any kind that can become uint8 [H, W, C] without guessing.

    A palette is looked up, an alpha channel that is opaque everywhere is dropped, black-and-white becomes 0 and 255, and
    a photograph is turned upright as its EXIF data say.

    Args:
      data: the file.
      where: names it in an error.
      channels: 1 or 3 to have all pictures alike (grey repeated as RGB, or RGB as its luma); None keeps them as they are.

    Raises:
      UserError: the bytes are no whole image, or it has transparent, CMYK or more than 8-bit pixels.
    """
    image = _open(data, where)
    if _PIL_BITS.get(image.mode, 8) > 8:
        raise UserError(f"{where} has {_PIL_BITS[image.mode]}-bit pixels: convert it to 8 bits per channel.")
    try:
        image = PIL.ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow parses these data only now
        if system_fails(error):
            raise
        raise UserError(f"{where} has damaged EXIF data.") from error
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("L", "LA") else "RGBA")
        if image.getextrema()[-1] != (255, 255):  # type: ignore[comparison-overlap]
            raise UserError(f"{where} has transparent pixels, which have no colour: put it on a background.")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    if image.mode not in _PIL_MODES.values():
        raise UserError(f"{where} has {image.mode} pixels, which need a colour profile to become RGB: convert it.")
    if channels:
        image = image.convert(_PIL_MODES[channels])
    return np.array(image, np.uint8).reshape(image.height, image.width, len(image.mode))


def fit(image: np.ndarray, where: str, resolution: int | None, transform: str = "none") -> np.ndarray:
    """Brings a picture to the wanted size with Pillow's Lanczos filter, as EDM's dataset tool does.

    Args:
      image: uint8 [H, W, C].
      where: names it in an error.
      resolution: R, of the result; None leaves pictures of any square size as they are.
      transform: ``center-crop`` cuts the middle square out first; ``none`` takes square pictures only.

    Returns:
      uint8 [R, R, C].

    Raises:
      UserError: the picture is not square and is not to be cropped.
    """
    height, width, channels = image.shape
    if height != width:
        if transform != "center-crop":
            raise UserError(
                f"{where} is {ImageShape(*image.shape)}, but images must be square: crop them, "
                "or have it done with --transform=center-crop."
            )
        side = min(height, width)
        image = image[(height - side) // 2 : (height + side) // 2, (width - side) // 2 : (width + side) // 2]
    if resolution is None or image.shape[0] == resolution:
        return image
    picture = PIL.Image.fromarray(image[..., 0] if channels == 1 else image)
    picture = picture.resize((resolution, resolution), PIL.Image.Resampling.LANCZOS)
    return np.array(picture, np.uint8).reshape(resolution, resolution, channels)


def _is_deep(tile: Any) -> bool:
    """Whether what Pillow is about to decode has more than 8 bits."""
    codec, _, _, args = tile
    return bool(_RAW_16_BITS.search(str(args))) or (codec.startswith("ppm") and args[-1] > 255)


def _open(data: bytes, where: str) -> PIL.Image.Image:
    if not data:
        raise UserError(f"{where} is not a readable image: the file is empty.")
    try:
        PIL.Image.init()
        image = PIL.Image.open(io.BytesIO(data), formats=[kind for kind in _KINDS if kind in PIL.Image.OPEN])
        large = image.width * image.height > _MAX_PIXELS
        deep = any(map(_is_deep, image.tile))
        if not large and not deep:
            image.load()
    except PIL.Image.DecompressionBombError:
        large = True
    except Exception as error:  # damaged files make Pillow raise nearly anything, struct.error included
        if system_fails(error):
            raise
        raise UserError(f"{where} is not a readable image (it is damaged or of an unknown kind).") from error
    if large:
        raise UserError(f"{where} claims more than {_MAX_PIXELS:,} pixels: it is not to be trusted, or too large.")
    if deep:
        raise UserError(f"{where} has 16-bit pixels: convert it to 8 bits per channel.")
    return image
