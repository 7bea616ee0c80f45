"""From the bytes of an image file to ``uint8 [H, W, C]``, accepting 8-bit grey and RGB and nothing else.

Whatever would need a decision (palettes, transparency, 16 bits, CMYK, cropping) is refused with the name of
the file: pixels are never changed on the way in.
"""

from __future__ import annotations

import functools
import io
import struct
from typing import NamedTuple

import numpy as np
import PIL.Image

from fdm_jax.errors import UserError

PNG_HEADER_BYTES = 33  # signature and IHDR chunk
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGB with alpha"}
_PIL_COLOURS = {"P": "palette", "LA": "grey with alpha", "RGBA": "RGB with alpha"} | dict.fromkeys(
    ("1", "L", "I", "F"), "grey"
)
_PIL_BITS = {"1": 1, "I;16": 16, "I;16B": 16, "I;16L": 16, "I;16N": 16, "I": 32, "F": 32}
_CHANNELS = {"grey": 1, "RGB": 3}


class ImageShape(NamedTuple):
    height: int
    width: int
    channels: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} with {self.channels} channel{'s' * (self.channels > 1)}"


@functools.cache
def image_extensions() -> frozenset[str]:
    """The lower-case file extensions that Pillow knows, with their dots."""
    return frozenset(PIL.Image.registered_extensions())


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
    try:
        image = PIL.Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # damaged files make Pillow raise nearly anything, struct.error included
        raise UserError(f"{where} is not a readable image (it is damaged or of an unknown kind).") from error
    mode = image.mode.partition(";")[0]
    bits = _PIL_BITS.get(image.mode, 8)
    shape = _shape(image.width, image.height, bits, _PIL_COLOURS.get(mode, mode), where)
    return np.array(image, np.uint8).reshape(shape)
