"""Pictures of all kinds become uint8 [R, R, C], or are refused with the reason."""

import io
import struct

import numpy as np
import PIL.EpsImagePlugin
import PIL.Image
import pytest

from fdm_jax.data.images import decode_picture, fit, image_names
from fdm_jax.errors import UserError

RNG = np.random.RandomState(0)
GREY, RGB = RNG.randint(0, 256, (6, 4), np.uint8), RNG.randint(0, 256, (6, 4, 3), np.uint8)
UNUSED = min({*range(256)} - {*GREY.flat})


def encoded(pixels, mode=None, kind="png", **options):
    out = io.BytesIO()
    image = pixels if isinstance(pixels, PIL.Image.Image) else PIL.Image.fromarray(pixels, mode)
    image.save(out, kind, **options)
    return out.getvalue()


def tiff16():
    """A 2x2 RGB TIFF of 16 bits per channel, which Pillow reads as 8-bit."""
    tags = {256: 2, 257: 2, 258: 122, 259: 1, 262: 2, 273: 128, 277: 3, 278: 2, 279: 24}
    entries = [struct.pack("<HHII", tag, 3, 3 if tag == 258 else 1, value) for tag, value in tags.items()]
    head = b"II*\0\10\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries)
    return head + bytes(4) + struct.pack("<3H", 16, 16, 16) + bytes(range(24))


def alpha(pixels, value):
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return np.concatenate([pixels, np.full((6, 4, 1), value, np.uint8)], axis=-1)


@pytest.mark.parametrize(
    "data, expected",
    [
        (encoded(GREY), GREY[..., None]),
        (encoded(RGB), RGB),
        (encoded(RGB, kind="bmp"), RGB),
        (encoded(RGB, kind="tiff"), RGB),
        (encoded(RGB, kind="ppm"), RGB),
        (f"P3 4 6 255 {' '.join(map(str, RGB.flat))} ".encode(), RGB),
        (encoded(RGB, kind="webp", lossless=True), RGB),
        (encoded(alpha(RGB, 255)), RGB),
        (encoded(alpha(GREY, 255)), GREY[..., None]),
        (encoded(GREY, transparency=UNUSED), GREY[..., None]),
        (encoded(PIL.Image.fromarray(GREY > 127)), np.where(GREY > 127, 255, 0)[..., None]),
        # 24 colours: a palette holds them all.
        (encoded(PIL.Image.fromarray(RGB).quantize(256, PIL.Image.Quantize.FASTOCTREE), kind="gif"), None),
    ],
)
def test_kinds_that_lose_nothing(data, expected):
    image = decode_picture(data, "x")
    assert image.dtype == np.uint8
    if expected is None:
        expected = np.array(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
        assert image.shape == (6, 4, 3)
    np.testing.assert_array_equal(image, expected)


def test_palette_with_its_own_colours():
    indexed = PIL.Image.fromarray(GREY % 3, "P")
    colours = np.array([[1, 2, 3], [200, 100, 50], [7, 8, 9]], np.uint8)
    indexed.putpalette(colours.tobytes())
    np.testing.assert_array_equal(decode_picture(encoded(indexed), "x"), colours[GREY % 3])


def test_channels():
    np.testing.assert_array_equal(decode_picture(encoded(GREY), "x", 3), np.stack([GREY] * 3, axis=-1))
    luma = RGB @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    assert abs(decode_picture(encoded(RGB), "x", 1)[..., 0] - luma).max() <= 1


def test_no_program_is_started_for_a_picture(monkeypatch):
    """Pillow has Ghostscript draw EPS files, whatever they are called."""
    started = []
    monkeypatch.setattr(PIL.EpsImagePlugin, "Ghostscript", lambda *args: started.append(args))
    with pytest.raises(UserError, match="not a readable image"):
        decode_picture(encoded(RGB, kind="eps"), "x.png")
    assert not started and image_names(["a.eps", "b.png", "c.pdf", "d.JPG", "e.txt"]) == ["b.png", "d.JPG"]


def test_exif_orientation():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
    np.testing.assert_array_equal(decode_picture(encoded(RGB, exif=exif), "x"), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "x.png is not a readable image: the file is empty"),
        (b"hello", "x.png is not a readable image"),
        (encoded(RGB)[:60], "x.png is not a readable image"),
        (encoded(alpha(RGB, 254)), "transparent"),
        (encoded(alpha(GREY, 0)), "transparent"),
        (encoded(PIL.Image.new("CMYK", (4, 4)), kind="tiff"), "CMYK pixels"),
        (encoded(PIL.Image.new("CMYK", (4, 4)), kind="jpeg"), "CMYK pixels"),
        (encoded(np.zeros((4, 4), np.uint16)), "16-bit"),
        (tiff16(), "16-bit"),
        (b"P6 4 1 65535\n" + bytes(24), "16-bit"),
        (encoded(np.zeros((4, 4), np.float32), kind="tiff"), "32-bit"),
        (encoded(RGB)[:16] + b"\0\1\0\0" * 2 + encoded(RGB)[24:], "not a readable image|claims more than"),
    ],
)
def test_refused(data, words):
    with pytest.raises(UserError, match=words) as caught:
        decode_picture(data, "x.png")
    assert "\n" not in str(caught.value)


def test_bombs_are_refused_before_they_are_unpacked():
    bomb = io.BytesIO()
    PIL.Image.new("1", (9000, 9000)).save(bomb, "png")  # 81 million pixels in 10 kB
    assert len(bomb.getvalue()) < 20_000
    with pytest.raises(UserError, match="x.png claims more than 67,108,864 pixels"):
        decode_picture(bomb.getvalue(), "x.png")


def test_transparent_palette():
    indexed = PIL.Image.fromarray(GREY % 3, "P")
    indexed.putpalette(bytes(range(9)))
    with pytest.raises(UserError, match="transparent"):
        decode_picture(encoded(indexed, transparency=1), "x")
    opaque = decode_picture(encoded(indexed, transparency=7), "x")  # an index that no pixel has
    np.testing.assert_array_equal(opaque, np.arange(9).reshape(3, 3)[GREY % 3])


@pytest.mark.parametrize(
    "shape, rows, columns",
    [((6, 4), (1, 5), (0, 4)), ((4, 7), (0, 4), (1, 5)), ((5, 8), (0, 5), (1, 6)), ((9, 4), (2, 6), (0, 4))],
)
def test_center_crop(shape, rows, columns):
    image = RNG.randint(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(fit(image, "x", None, "center-crop"), image[slice(*rows), slice(*columns)])
    with pytest.raises(UserError, match="x is .* square.*--transform=center-crop"):
        fit(image, "x", None)


def lanczos(image, size):
    """Lanczos with three lobes, the kernel stretched by the scale and normalised, one axis after the other."""
    scale = len(image) / size
    centres = (np.arange(size) + 0.5) * scale
    distance = (np.arange(len(image)) + 0.5 - centres[:, None]) / max(scale, 1)
    weights = np.where(abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("ih,jw,hwc->ijc", weights, weights, image)


@pytest.mark.parametrize("size", [8, 16, 40])
@pytest.mark.parametrize("channels", [1, 3])
def test_lanczos(size, channels):
    image = RNG.randint(90, 166, (32, 32, channels), np.uint8)  # far from 0 and 255, at which Pillow clips in between
    resized = fit(image, "x", size)
    assert resized.shape == (size, size, channels) and resized.dtype == np.uint8
    difference = abs(resized - lanczos(image.astype(float), size))
    assert difference.max() < 1.5 and difference.mean() < 0.5  # 8 bits between the axes, and at the end
    np.testing.assert_array_equal(fit(image, "x", 32), image)
