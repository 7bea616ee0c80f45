"""Every kind of bad data set, and the sentence that names what is wrong."""

import io
import json
import os
import re
import struct
import zipfile
import zlib

import PIL.Image
import pytest

from fdm_jax.data.opening import open_source
from fdm_jax.errors import UserError

SECOND = "00000/img00000001.png"


def encoded(mode, size=(4, 4), kind="png"):
    out = io.BytesIO()
    PIL.Image.new(mode, size).save(out, kind)
    return out.getvalue()


def png16():
    """A 4x4 RGB PNG of 16 bits per channel, which Pillow cannot write and reads as 8-bit."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(4 * (1 + 4 * 6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def fails(words, path, **options):
    """Opens and reads everything, and expects one sentence with the words in it, in this order."""
    with pytest.raises(UserError, match=".*".join(map(re.escape, words))) as caught:
        source = open_source(path, **options)
        source.read(range(len(source)))
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence[-1] in ".?"
    return sentence


def test_unknown_names(tmp_path):
    fails(["'digts'", "did you mean 'digits'?"], "digts")
    fails(["'imagenet'", "choose one of afhqv2, cifar10, digits"], "imagenet")
    for missing in ("cifar10.zip", "data/cifar10"):
        fails(["no zip file or folder is at", missing], str(tmp_path / missing))
    fails(["no zip file or folder is at cifar10.zip"], "cifar10.zip")


def test_no_path_and_no_file(tmp_path, archives, files, monkeypatch):
    monkeypatch.chdir(archives.dir(files))
    fails(["the data source is empty"], "")
    os.mkfifo(tmp_path / "pipe.zip")
    fails(["no zip file or folder is at", "pipe.zip"], tmp_path / "pipe.zip")


def test_zip_that_is_none(tmp_path, archives, files):
    text = tmp_path / "b.zip"
    text.write_text("hello")
    fails([str(text), "is not a zip file"], text)
    cut = tmp_path / "a.zip"
    archives.zip(files)
    cut.write_bytes(cut.read_bytes()[:-300])
    fails([str(cut), "damaged or incomplete"], cut)


@pytest.mark.parametrize("name", [SECOND, "dataset.json"])
def test_damaged_entry_of_a_zip(tmp_path, archives, files, name):
    path = archives.zip(files)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    start = data.index(files[name])
    data[start + len(files[name]) - 20] ^= 0xFF  # in the compressed pixels: only the checksum can tell
    (tmp_path / "a.zip").write_bytes(data)
    assert fails([path, "CRC"], path).startswith(f"{name} in {path} cannot be read")


def test_zips_that_cannot_be_unpacked(tmp_path, files):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as out:
        out.writestr(SECOND, files[SECOND])
    whole = path.read_bytes()
    start = whole.index(SECOND.encode()) + len(SECOND)
    path.write_bytes(whole[: start + 12] + bytes(8) + whole[start + 20 :])
    fails([SECOND, "cannot be read", "is the zip damaged?"], path, use_labels=False)
    directory = whole.index(b"PK\1\2")  # where, at 6, the version stands that is needed to unpack
    path.write_bytes(whole[: directory + 6] + b"\xfa" + whole[directory + 7 :])
    fails(["a.zip is not a zip file, or a damaged or incomplete one (zip file version 25.0)"], path)


@pytest.mark.parametrize("kind", ["zip", "dir"])
@pytest.mark.parametrize(
    "bad, words",
    [
        (b"", ["is not a readable image"]),
        (b"GIF89a", ["is not a readable image"]),
        (lambda whole: whole[:50], ["is not a readable image"]),
        (lambda whole: whole[:20], ["is not a readable image"]),
        (encoded("RGB", (8, 8)), ["is 8x8 with 3 channels", "00000/img00000000.png is 4x4 with 3 channels"]),
        (encoded("RGB", (4, 2)), ["is 4x2 with 3 channels", "00000/img00000000.png is 4x4 with 3 channels"]),
        (encoded("RGB", (8, 8), "jpeg"), ["is 8x8 with 3", "is 4x4 with 3"]),  # a JPEG under a PNG's name
        (encoded("L"), ["is 4x4 with 1 channel,", "is 4x4 with 3 channels"]),
        (encoded("RGBA"), ["RGB with alpha", "convert it to grey (1 channel) or RGB (3 channels)"]),
        (encoded("LA"), ["grey with alpha"]),
        (encoded("P"), ["palette"]),
        (encoded("1"), ["1-bit pixels", "8 bits"]),
        (encoded("I;16"), ["16-bit pixels", "8 bits"]),
        (png16(), ["16-bit pixels", "8 bits"]),
        (encoded("CMYK", kind="tiff"), ["CMYK"]),
        (encoded("RGBA", kind="tiff"), ["RGB with alpha"]),
        (encoded("I;16", kind="tiff"), ["16-bit"]),
        (encoded("F", kind="tiff"), ["32-bit"]),
    ],
)
def test_bad_image(archives, files, kind, bad, words):
    bad = bad(files[SECOND]) if callable(bad) else bad
    fails([SECOND, *words], getattr(archives, kind)(files | {SECOND: bad}))


def test_bad_image_that_is_found_only_on_reading(archives, files):
    """The header is right but the pixels are cut short: the images before it can be used."""
    source = open_source(archives.dir(files | {SECOND: files[SECOND][:45]}))
    source.read([0, 2])
    with pytest.raises(UserError, match=f"{SECOND} in .* is not a readable image"):
        source.read([2, 1])


def test_another_shape_that_the_header_of_a_png_tells(archives, files):
    """At once, not at the first batch; so that a run does not end hours later."""
    with pytest.raises(UserError, match=f"{SECOND} in .* is 8x8 with 3 channels"):
        open_source(archives.zip(files | {SECOND: encoded("RGB", (8, 8))}))


@pytest.mark.parametrize("bad, is_", [(("L",), "4x4 with 1 channel,"), (("RGB", (1, 1)), "1x1 with 3 channels")])
def test_another_shape_that_is_found_only_on_reading(archives, bad, is_):
    """Headers of other kinds than PNG are not read at first; NumPy would repeat either to fill the image."""
    names = {f"{i}.tiff": encoded(*of, kind="tiff") for i, of in enumerate([("RGB",), bad])}
    source = open_source(archives.dir(names), use_labels=False, cache_mb=0)
    source.read([0])
    with pytest.raises(UserError, match=f"1.tiff in .* is {is_}.* but 0.tiff is 4x4 with 3 channels"):
        source.read([1])


def test_image_that_vanishes(tmp_path, archives, files):
    source = open_source(archives.dir(files))
    (tmp_path / "a" / SECOND).unlink()
    with pytest.raises(UserError, match=f"{SECOND} is missing from the folder"):
        source.read([1])


def test_images_that_are_not_square(archives):
    path = archives.zip({"x.png": encoded("RGB", (4, 6))})
    fails(["x.png", "is 4x6 with 3 channels", "square"], path, use_labels=False)


def test_no_images(archives):
    fails(["holds no image files"], archives.zip({"dataset.json": b"{}", "a.txt": b""}))


PAIRS = [[f"0000{i // 4}/img{i:08d}.png", 0] for i in range(7)]


@pytest.mark.parametrize("kind", ["zip", "dir"])
@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["dataset.json", "is missing from", "class_conditional=False"]),
        (b'{"labels": [', ["dataset.json", "not valid JSON"]),
        (b"\xff\xfe\x00", ["dataset.json", "not valid JSON"]),
        ([], ["dataset.json", 'no "labels"']),
        (3, ["dataset.json", 'no "labels"']),
        ({"label": []}, ["dataset.json", 'no "labels"']),
        ({"labels": None}, ["dataset.json", "null", "class_conditional=False"]),
        ({"labels": {"a": 1}}, ["dataset.json", 'not {"a": 1}']),
        ({"labels": [*PAIRS, ["x.png"]]}, ["dataset.json", '["x.png"]', "[file name, class]"]),
        ({"labels": [*PAIRS, 3]}, ["dataset.json", "holds 3 where", "[file name, class]"]),
        ({"labels": [*PAIRS, [3, 3]]}, ["dataset.json", "[3, 3]", "[file name, class]"]),
        ({"labels": [*PAIRS, ["x.png", 1]]}, ["x.png", "dataset.json", "missing from"]),
        ({"labels": PAIRS[:5]}, ["dataset.json", "no label for 00001/img00000005.png", "1 more of 7"]),
        ({"labels": [*PAIRS[1:], [PAIRS[0][0], -1]]}, ["img00000000.png", "label -1", "whole number from 0"]),
        ({"labels": [*PAIRS[1:], [PAIRS[0][0], 1.5]]}, ["img00000000.png", "label 1.5", "whole number"]),
        ({"labels": [*PAIRS[1:], [PAIRS[0][0], "3"]]}, ["img00000000.png", 'label "3"', "whole number"]),
        ({"labels": [*PAIRS[1:], [PAIRS[0][0], True]]}, ["img00000000.png", "label true", "whole number"]),
        ({"labels": [*PAIRS[1:], [PAIRS[0][0], [0.5] * 99]]}, ["img00000000.png", "...", "whole number"]),
        ({"labels": [*PAIRS, [PAIRS[0][0], 2]]}, ["img00000000.png", "two labels, 0 and 2"]),
        ({"labels": PAIRS, "class_names": "ab"}, ["dataset.json", 'different names, not "ab"']),
        ({"labels": PAIRS, "class_names": ["a", 1]}, ["dataset.json", 'different names, not ["a", 1]']),
        ({"labels": PAIRS, "class_names": ["a", "a"]}, ["dataset.json", 'different names, not ["a", "a"]']),
        (
            {"labels": [*PAIRS[1:], [PAIRS[0][0], 2]], "class_names": ["a", "b"]},
            ["img00000000.png", "has the label 2, but with 2 classes labels go from 0 to 1"],
        ),
    ],
)
def test_bad_labels(archives, files, kind, content, words):
    bad = {name: data for name, data in files.items() if name != "dataset.json"}
    if content is not None:
        bad["dataset.json"] = content if isinstance(content, bytes) else json.dumps(content).encode()
    fails(words, getattr(archives, kind)(bad))


def test_splits_and_counts(archives, files):
    path = archives.zip(files)
    fails(["split is 'test'", "only 'train'"], path, split="test")
    fails(["max_images is 0", "at least 1"], path, max_images=0)
    assert len(open_source(path, split="all")) == 7


def test_first_image_is_judged_by_the_same_rules(archives):
    fails(["x.png", "16-bit"], archives.zip({"x.png": encoded("I;16")}), use_labels=False)
