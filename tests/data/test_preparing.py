"""Data sets of every kind, prepared and read back: pixels, labels and names against the files written here."""

import errno
import gzip
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from encoded import png

from fdm_jax.data import preparing
from fdm_jax.data.builders import LocalImages, prepare
from fdm_jax.data.export import write_zip
from fdm_jax.data.opening import open_source
from fdm_jax.data.prepared import PreparedSource
from fdm_jax.data.preparing import Request, prepare_dataset
from fdm_jax.errors import UserError
from fdm_jax.storage_errors import file_trouble

RNG = np.random.RandomState(1)


def prepared(data_dir, name, source, split="train", **options):
    folder, left_out = prepare_dataset(Request(name=name, source=source, **options), data_dir)
    assert not left_out
    return PreparedSource(folder, split)


def refused(words, data_dir, name, source, **options):
    with pytest.raises(UserError, match=words) as caught:
        prepare_dataset(Request(name=name, source=source, **options), data_dir)
    assert "\n" not in str(caught.value)
    assert not [path for path in data_dir.rglob("*") if path.is_dir() and "1.0.0" in path.name]  # nor an incomplete one


@pytest.fixture
def path(archives):
    """Writes files as a folder or a zip, and gives the path."""
    from pathlib import Path

    return lambda files, kind="dir", **name: Path(getattr(archives, kind)(files, **name))


@pytest.mark.parametrize("kind", ["zip", "dir"])
def test_edm_layout(path, tmp_path, files, pixels, kind):
    source = prepared(tmp_path / "data", "zip", path(files, kind))
    spec = source.spec
    assert (spec.name, spec.num_images, spec.resolution, spec.channels) == ("zip/a", 7, 4, 3)
    assert spec.num_classes == 3 and spec.class_names == ("0", "1", "2")
    batch = source.read(np.array([6, 0, 3, 3]))
    np.testing.assert_array_equal(batch["image"], pixels[[6, 0, 3, 3]])
    np.testing.assert_array_equal(batch["label"], np.array([6, 0, 3, 3]) % 3)
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32


def test_a_zip_and_its_folder_have_one_checksum_which_follows_the_content(path, tmp_path, files):
    other = files | {"00000/img00000001.png": png(RNG.randint(0, 9, (4, 4, 3), np.uint8))}
    relabelled = files | {"dataset.json": files["dataset.json"].replace(b"2]", b"1]")}
    sums = []
    for kind, some, labels in (
        ("zip", files, "auto"), ("dir", files, "auto"), ("zip", other, "auto"), ("zip", relabelled, "auto"),
        ("zip", files, "none"), ("zip", relabelled, "none"),
    ):  # fmt: skip
        source = prepared(tmp_path / f"data{len(sums)}", "zip", path(some, kind), labels=labels)
        sums.append(source.metadata["sha256"])
    assert len(sums[0]) == 64 and sums[0] == sums[1] and sums[4] == sums[5]  # labels count where they are used
    assert len(set(sums)) == 4


def test_described_and_read_by_its_folder_alone(path, tmp_path, files, pixels):
    data_dir = tmp_path / "data"
    prepared(data_dir, "zip", path(files, "zip"))
    moved = tmp_path / "elsewhere"
    shutil.move(data_dir / "zip" / "a" / "1.0.0", moved)
    shutil.rmtree(data_dir)
    (tmp_path / "a.zip").unlink()
    source = open_source(moved, cache_mb=0)
    assert isinstance(source, PreparedSource) and source.metadata["source"] == "a.zip"
    copy = pickle.loads(pickle.dumps(source))
    for each in (source, copy):
        np.testing.assert_array_equal(each.read(range(7))["image"], pixels)
        assert each.spec.num_classes == 3


def test_a_folder_of_sets_that_were_moved_there(path, tmp_path, files):
    (tmp_path / "sets").mkdir()
    for name in ("cats", "dogs"):
        prepared(tmp_path / name, "zip", path(files, "zip"))
        shutil.move(tmp_path / name / "zip" / "a" / "1.0.0", tmp_path / "sets" / name)
    with pytest.raises(UserError, match="sets is prepared as cats, dogs: name one, as in sets/cats"):
        open_source(tmp_path / "sets")
    assert len(open_source(tmp_path / "sets" / "dogs")) == len(open_source("dogs", data_dir=tmp_path / "sets")) == 7


def test_folders_are_classes(path, tmp_path, pixels):
    files = {f"{'cat dog'.split()[i % 2]}/deep/{i}.png": png(image) for i, image in enumerate(pixels)}
    source = prepared(tmp_path / "data", "folder", path(files))
    assert source.spec.class_names == ("cat", "dog")
    order = [0, 2, 4, 6, 1, 3, 5]
    batch = source.read(range(7))
    np.testing.assert_array_equal(batch["image"], pixels[order])
    np.testing.assert_array_equal(batch["label"], [0, 0, 0, 0, 1, 1, 1])
    # The same folder as it is.
    direct = open_source(path(files)).read(range(7))
    np.testing.assert_array_equal(direct["image"], batch["image"])
    np.testing.assert_array_equal(direct["label"], batch["label"])


@pytest.mark.parametrize(
    "names, labels, classes",
    [
        (["a/1.png", "b/2.png"], "none", 0),
        (["a/1.png", "b/2.png"], "folders", 2),
        (["a/1.png", "b/2.png"], "auto", 2),
        (["00000/1.png", "00001/2.png"], "auto", 0),  # EDM's and FFHQ's numbered folders
        (["00000/1.png", "00001/2.png"], "folders", 2),
        (["a/1.png", "2.png"], "auto", 0),
        (["a/1.png", "b/2.png", "3.png"], "auto", 0),
        (["a/1.png", "a/2.png"], "auto", 0),
    ],
)
def test_where_labels_come_from(path, tmp_path, pixels, names, labels, classes):
    files = {name: png(pixels[i]) for i, name in enumerate(names)}
    source = prepared(tmp_path / "data", "folder", path(files), labels=labels)
    assert source.spec.num_classes == classes
    np.testing.assert_array_equal(source.read([0, 1])["label"], [0, 1] if classes else [0, 0])


def test_labels_that_are_asked_for_must_be_there(path, tmp_path, pixels):
    folders = {name: png(pixels[i]) for i, name in enumerate(["a/1.png", "b/2.png"])}
    refused(
        "dataset.json, which holds the labels, is missing", tmp_path / "data", "folder", path(folders), labels="json"
    )
    some = path(folders | {"3.png": png(pixels[2])}, name="some")
    refused("3.png in .* lies in no folder", tmp_path / "data", "folder", some, labels="folders")


def test_names_of_classes(path, tmp_path, files):
    data_dir = tmp_path / "data"
    named = prepared(data_dir, "zip", path(files, "zip"), classes=("x", "y", "z", "unused"))
    assert named.spec.class_names == ("x", "y", "z", "unused") and named.spec.num_classes == 4
    content = json.loads(files["dataset.json"]) | {"class_names": ["r", "s", "t"]}
    own = path(files | {"dataset.json": json.dumps(content).encode()}, "zip", name="own.zip")
    assert prepared(data_dir, "zip", own).spec.class_names == ("r", "s", "t")
    refused("label 2, but with 2 classes labels go from 0 to 1", tmp_path / "x", "zip", own, classes=("r", "s"))
    refused("has no label", tmp_path / "x", "zip", path(files | {"new.png": png(np.zeros((4, 4, 3), np.uint8))}))
    refused("--classes must be different words", tmp_path / "x", "zip", own, classes=("r", "r"))
    refused("--classes must be different words", tmp_path / "x", "zip", own, classes=("r", " ", "t"))
    refused("has no labels: leave it out", tmp_path / "x", "zip", own, classes=("r", "s"), labels="none")


@pytest.mark.parametrize("name", ["", " ", "dog ", "a\nb", "a\rb", os.fsdecode(b"caf\xe9")])
def test_names_of_classes_that_would_be_read_back_as_others(path, tmp_path, files, name):
    content = json.loads(files["dataset.json"]) | {"class_names": ["cat", name, "dog"]}
    source = path(files | {"dataset.json": json.dumps(content).encode()}, "zip")
    refused(re.escape(f"has a class called {name!r}, which"), tmp_path / "data", "zip", source)
    assert prepared(tmp_path / "data", "zip", source, classes=("cat", "wild cat", "dog")).spec.num_classes == 3


def test_ffhq64(path, tmp_path):
    from fdm_jax.data.images import fit

    images = RNG.randint(0, 256, (3, 128, 128, 3), np.uint8)
    source = prepared(tmp_path / "data", "ffhq64", path({f"{i:05d}/{i:05d}.png": png(images[i]) for i in range(3)}))
    assert (source.spec.name, source.spec.num_images, source.spec.resolution) == ("ffhq64", 3, 64)
    assert source.spec.num_classes == 0
    np.testing.assert_array_equal(source.read(range(3))["image"], [fit(image, "", 64) for image in images])


@pytest.mark.parametrize("above", ["", "afhq/"])
def test_afhqv2(path, tmp_path, above):
    names = [
        f"{above}{split}/{kind}/{i}.png"
        for split in ("train", "test")
        for kind in ("cat", "dog", "wild")
        for i in (0, 1)
    ]
    images = RNG.randint(0, 256, (len(names), 64, 64, 3), np.uint8)
    files = {name: png(image) for name, image in zip(names, images, strict=True)}
    source = prepared(tmp_path / "data", "afhqv2", path(files, "zip"), split="all")
    assert source.spec.class_names == ("cat", "dog", "wild") and len(source) == 12
    np.testing.assert_array_equal(source.read(range(12))["image"], images)
    np.testing.assert_array_equal(source.read(range(12))["label"], [0, 0, 1, 1, 2, 2] * 2)
    assert len(open_source("afhqv2", split="test", data_dir=tmp_path / "data")) == 6
    without = {name: data for name, data in files.items() if "test" not in name}
    refused("no pictures in .*test/", tmp_path / "x", "afhqv2", path(without, name="b"))


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(pack=gzip.compress, size=28):
    arrays = {"train": (RNG.randint(0, 256, (5, size, size), np.uint8), np.array([0, 3, 1, 2, 9], np.uint8))}
    arrays["t10k"] = RNG.randint(0, 256, (2, size, size), np.uint8), np.array([4, 4], np.uint8)
    end = ".gz" if pack is gzip.compress else ""
    files = {}
    for split, (images, labels) in arrays.items():
        files[f"{split}-images-idx3-ubyte{end}"] = pack(idx(images))
        files[f"{split}-labels-idx1-ubyte{end}"] = pack(idx(labels))
    return arrays, files


def test_by_a_user_who_is_only_a_number(path, tmp_path, files, pixels, nameless):
    source = prepared(tmp_path / "data", "zip", path(files))
    np.testing.assert_array_equal(source.read(range(7))["image"], pixels)


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gz", "plain"])
def test_mnist(path, tmp_path, pack):
    arrays, files = mnist_files(pack)
    for split, (images, labels) in arrays.items():
        source = prepared(tmp_path / "data", "mnist", path(files), split="train" if split == "train" else "test")
        assert (source.spec.resolution, source.spec.channels, source.spec.num_classes) == (32, 1, 10)
        batch = source.read(range(len(labels)))
        np.testing.assert_array_equal(batch["image"][..., 0], np.pad(images, [(0, 0), (2, 2), (2, 2)]))
        np.testing.assert_array_equal(batch["label"], labels)
    same = prepared(tmp_path / "data", "mnist", path(files), config="as-is", resolution=28)
    np.testing.assert_array_equal(same.read(range(5))["image"][..., 0], arrays["train"][0])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d[: len(d) // 2], "train-images-idx3-ubyte .*fewer bytes than"),
        (lambda d: d + b"x", "more bytes than the 3,920 it announces"),
        (lambda d: b"\0\0\x0d" + d[3:], "is not an idx file of bytes"),
        (lambda d: d[:4] + b"\x7f\xff\xff\xff" + d[8:], "claims .* bytes: it is not to be trusted"),
        (lambda d: d[:4] + struct.pack(">I", 4) + d[8:16] + d[16 : 16 + 4 * 784], "4 train images and 5 labels"),
        (
            lambda d: d[:8] + struct.pack(">II", 14, 56) + d[16:],
            "has images of 56x14: all must be square, alike and not",
        ),
        (lambda d: d[:8] + struct.pack(">II", 14, 14) + d[16 : 16 + 980], "t10k-.* has images of 28x28: all must be"),
        (lambda d: d[:8] + struct.pack(">II", 0, 0), "has images of 0x0"),
        (None, "no train images: a file such as train-images-idx3-ubyte is missing"),
    ],
)
def test_bad_idx_files(path, tmp_path, change, words):
    _, files = mnist_files(bytes)
    name = "train-images-idx3-ubyte"
    files[name] = change(files[name]) if change else files.pop(name) and b""
    if not change:
        del files[name]
    refused(words, tmp_path / "data", "mnist", path(files))
    refused("no folder is at", tmp_path / "data", "mnist", tmp_path / "nowhere")


def test_idx_files_of_two_data_sets_in_one_folder(path, tmp_path):
    """EMNIST has all of its parts in one."""
    _, files = mnist_files()
    other = {name.replace("t10k", "emnist-letters-test"): data for name, data in files.items() if "t10k" in name}
    train = {name: data for name, data in files.items() if "train" in name}
    refused("holds both emnist-letters-test-images.* and train-images", tmp_path / "data", "mnist", path(other | train))


BAD = {
    "zero.png": b"",
    "text.png": b"hello",
    "tall.png": png(np.zeros((6, 4, 3), np.uint8)),
    "grey.png": png(np.zeros((4, 4), np.uint8)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_named_or_left_out_and_counted(path, tmp_path, pixels, name):
    files = {f"{i}.png": png(image) for i, image in enumerate(pixels)}
    source = path(files | {f"3/{name}": BAD[name]}, "zip")  # sorted between "3.png" and "4.png"
    where = f"3/{name} in .*a.zip"
    refused(where, tmp_path / "data", "folder", source)
    folder, left_out = prepare_dataset(Request(name="folder", source=source, skip_bad=True), tmp_path / "data")
    assert len(left_out) == 1 and f"3/{name}" in left_out[0]
    rest = PreparedSource(folder)
    np.testing.assert_array_equal(rest.read(range(7))["image"], pixels)
    assert rest.metadata["left_out"] == 1 and len(rest) == 7


def failing(monkeypatch, name, number):
    """Where files of pictures are opened, those of a name fail with an error of the system's."""

    def fail(path, *args, **kwargs):
        if pathlib.Path(path).name == name:
            raise OSError(number, os.strerror(number), path)
        return open(path, *args, **kwargs)

    monkeypatch.setattr("fdm_jax.data.archives.open", fail, raising=False)


@pytest.mark.parametrize("name", ["0.png", "3.png"])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.EACCES])
def test_a_picture_is_not_left_out_for_what_may_be_no_fault_of_its_own(
    path, tmp_path, monkeypatch, pixels, name, number
):
    source = path({f"{i}.png": png(image) for i, image in enumerate(pixels)})
    request = Request(name="folder", source=source, skip_bad=True)
    with monkeypatch.context() as patch:
        failing(patch, name, number)
        words = rf"{name} in {source} cannot be read \({os.strerror(number)}\)"
        refused(words, tmp_path / "data", "folder", source, skip_bad=True)
    folder, left_out = prepare_dataset(request, tmp_path / "data")
    assert not left_out and len(PreparedSource(folder)) == 7
    with monkeypatch.context() as patch:  # nor is the source another one
        failing(patch, name, number)
        with pytest.raises(UserError, match=words):
            prepare_dataset(request, tmp_path / "data")
    assert prepare_dataset(request, tmp_path / "data") == (folder, [])


def test_a_damaged_disk_makes_a_picture_bad(path, tmp_path, monkeypatch, pixels):
    source = path({f"{i}.png": png(image) for i, image in enumerate(pixels)})
    failing(monkeypatch, "3.png", errno.EIO)
    request = Request(name="folder", source=source, skip_bad=True)
    folder, left_out = prepare_dataset(request, tmp_path / "data")
    assert len(left_out) == 1 and "3.png" in left_out[0] and len(PreparedSource(folder)) == 6
    assert prepare_dataset(request, tmp_path / "data") == (folder, [])


def test_full_memory_makes_no_picture_bad(path, tmp_path, monkeypatch, pixels):
    def no_memory(*args):
        raise MemoryError

    source = path({f"{i}.png": png(image) for i, image in enumerate(pixels)})
    monkeypatch.setattr("PIL.Image.Image.load", no_memory)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", no_memory)
    with pytest.raises(MemoryError):
        prepare_dataset(Request(name="folder", source=source, skip_bad=True), tmp_path / "data")


def test_nothing_is_left_in_the_temporary_folder(path, tmp_path, monkeypatch, pixels):
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    source = path({f"{i}.png": png(image) for i, image in enumerate(pixels)})
    folder, _ = prepare_dataset(Request(name="folder", source=source), tmp_path / "data")
    assert len(PreparedSource(folder)) == 7 and not list(temporary.iterdir())


def test_bad_pictures_first_last_and_alone(path, tmp_path, monkeypatch, pixels):
    monkeypatch.setattr("fdm_jax.data.builders.SHARD_BYTES", 2 * 48)  # two images a shard, so that the last is empty
    files = {"0/bad.png": b"", "zz/bad.png": b"x", "zz/worse.png": b"y"}
    good = {f"1/{i}.png": png(image) for i, image in enumerate(pixels)}
    request = Request(name="folder", source=path(files | good), skip_bad=True, labels="folders")
    folder, left_out = prepare_dataset(request, tmp_path / "data")
    assert len(left_out) == 3
    source = PreparedSource(folder)
    np.testing.assert_array_equal(source.read(range(7))["image"], pixels)
    assert set(source.read(range(7))["label"]) == {1}
    refused("holds no readable picture", tmp_path / "x", "folder", path(files, name="b"), skip_bad=True)


def test_labels_stay_with_their_pictures_when_some_are_left_out(path, tmp_path, files, pixels):
    some = files | {"00000/img00000002.png": b"no picture"}
    folder, left_out = prepare_dataset(Request(name="zip", source=path(some), skip_bad=True), tmp_path / "data")
    batch = PreparedSource(folder).read(range(6))
    np.testing.assert_array_equal(batch["image"], pixels[[0, 1, 3, 4, 5, 6]])
    np.testing.assert_array_equal(batch["label"], [0, 1, 0, 1, 2, 0])


def test_pictures_of_all_sizes_with_resolution_and_crop(path, tmp_path):
    sizes = [(20, 30, 3), (64, 40, 3), (16, 16, 3)]
    images = [RNG.randint(0, 256, size, np.uint8) for size in sizes]
    source = path({f"{i}.png": png(image) for i, image in enumerate(images)})
    refused("0.png .* is 30x20 .*--transform=center-crop", tmp_path / "data", "folder", source, resolution=16)
    crop = {"transform": "center-crop"}
    refused("1.png in .* is 40x40 .* but others are 20x20", tmp_path / "data", "folder", source, **crop)
    result = prepared(tmp_path / "data", "folder", source, resolution=16, **crop)
    np.testing.assert_array_equal(result.read([2])["image"][0], images[2])
    assert result.spec.resolution == 16


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"])
def test_paths_that_climb_out(archives, files, tmp_path, name):
    with pytest.raises(UserError, match="leads out of the archive"):
        open_source(archives.zip(files | {name: b""}))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_and_bombs(tmp_path, files, pixels):
    import zipfile

    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as out:
        for _ in range(2):
            out.writestr("a.png", png(pixels[0]))
    refused("two files called 'a.png'", tmp_path / "data", "zip", tmp_path / "twice.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as out:
        with out.open("a.png", "w") as entry:
            for _ in range(320):
                entry.write(bytes(2**20))
    refused("claims to hold 335,544,320: no pictures compress so well", tmp_path / "data", "zip", tmp_path / "bomb.zip")


def test_prepared_twice(path, tmp_path, files, capfd):
    source, data_dir = path(files, "zip"), tmp_path / "data"
    first = prepare_dataset(Request(name="zip", source=source), data_dir)[0]
    stamp = os.stat(first / "features.json").st_mtime_ns
    assert prepare_dataset(Request(name="zip", source=source), data_dir)[0] == first
    assert os.stat(first / "features.json").st_mtime_ns == stamp
    with pytest.raises(
        UserError, match=r"zip/a is prepared already, with another resolution: delete .*1\.0\.0 .*--name"
    ):
        prepare_dataset(Request(name="zip", source=source, resolution=8), data_dir)
    assert prepare_dataset(Request(name="zip", source=source, resolution=8, config="small"), data_dir)[0] != first
    with pytest.raises(UserError, match="zip is prepared as a, small: name one, as in zip/a"):
        open_source("zip", data_dir=data_dir)


@pytest.mark.parametrize("kind", ["zip", "dir"])
@pytest.mark.parametrize("changed", ["00000/img00000001.png", "dataset.json"])
def test_another_source_of_the_same_name_is_not_taken_for_the_first(path, tmp_path, files, kind, changed):
    """Such as cats/train and dogs/train."""
    data_dir, first = tmp_path / "data", path(files, kind)
    folder = prepare_dataset(Request(name="zip", source=first), data_dir)[0]
    elsewhere = tmp_path / "elsewhere" / first.name
    elsewhere.parent.mkdir()
    (shutil.copytree if first.is_dir() else shutil.copy)(first, elsewhere)
    assert prepare_dataset(Request(name="zip", source=elsewhere), data_dir)[0] == folder
    content = files[changed].replace(b"png", b"gif", 1)  # somewhere in it, and as long
    other = files | {changed: content if changed == "dataset.json" else png(np.zeros((4, 4, 3), np.uint8))}
    (shutil.rmtree if first.is_dir() else os.remove)(first)
    assert path(other, kind) == first
    with pytest.raises(UserError, match="zip/a is prepared already, with another source: delete"):
        prepare_dataset(Request(name="zip", source=first), data_dir)
    (shutil.rmtree if first.is_dir() else os.remove)(first)
    assert prepare_dataset(Request(name="zip", source=first), data_dir)[0] == folder  # it is not needed any more


def test_one_source_by_several_paths(path, tmp_path, files, monkeypatch):
    folder, _ = prepare_dataset(Request(name="zip", source=path(files)), tmp_path / "data")
    for place, source in (("a", "."), ("a/00000", "..")):
        monkeypatch.chdir(tmp_path / place)
        assert prepare_dataset(Request(name="zip", source=pathlib.Path(source)), tmp_path / "data")[0] == folder


def test_other_mnists_and_what_does_not_belong_to_a_source(path, tmp_path, pixels):
    """torchvision puts MNIST and FashionMNIST into folders of one name."""
    first, others = path(mnist_files()[1], name="MNIST/raw"), path(mnist_files()[1], name="FashionMNIST/raw")
    folder = prepare_dataset(Request(name="mnist", source=first), tmp_path / "data")[0]
    with pytest.raises(UserError, match="mnist is prepared already, with another source"):
        prepare_dataset(Request(name="mnist", source=others), tmp_path / "data")
    pictures = path({"1.png": png(pixels[0]), "2.png": png(pixels[1])}, name="pictures")
    (pictures / "bad.png").symlink_to("nowhere")
    request = Request(name="folder", source=pictures, skip_bad=True)
    _, left_out = prepare_dataset(request, tmp_path / "data")
    assert len(left_out) == 1
    for where in (first, pictures):
        (where / "notes.txt").symlink_to("nowhere")
    assert prepare_dataset(Request(name="mnist", source=first), tmp_path / "data")[0] == folder
    assert prepare_dataset(request, tmp_path / "data")[1] == []


def test_two_that_prepare_different_things_under_one_name_at_once(path, tmp_path, files, pixels, monkeypatch):
    data_dir, second = tmp_path / "data", path(files, name="b/a")
    request = Request(name="zip", source=path(files, name="a"), labels="none")

    def read_slowly(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr("fdm_jax.data.preparing.read_pictures", read)
            prepare_dataset(request, data_dir)  # by the other process
        return read(*args, **kwargs)

    read = preparing.read_pictures
    monkeypatch.setattr("fdm_jax.data.preparing.read_pictures", read_slowly)
    with pytest.raises(UserError, match="zip/a is prepared already, with another labels"):
        prepare_dataset(Request(name="zip", source=second), data_dir)
    assert prepare_dataset(request, data_dir)[1] == []


def test_failure_in_the_middle_leaves_nothing(path, tmp_path, files, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(LocalImages, "_download_and_prepare", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_dataset(Request(name="zip", source=path(files)), tmp_path / "data")
    assert not list((tmp_path / "data" / "zip").rglob("*.json"))
    assert len(prepared(tmp_path / "data", "zip", path(files))) == 7


@pytest.mark.parametrize("there", [False, True])
def test_an_error_of_the_disk_counts_unless_another_process_was_faster(tmp_path, there):
    """TFDS renames its folder at last, which fails where another has done so."""
    folder = tmp_path / "1.0.0"

    def fail(download_dir):
        if there:
            folder.mkdir()
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

    make_builder = lambda: types.SimpleNamespace(data_dir=folder, download_and_prepare=fail)  # noqa: E731
    if there:
        assert prepare(tmp_path, "zip/a", make_builder) == folder
    else:
        with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
            prepare(tmp_path, "zip/a", make_builder)


def test_a_shard_that_was_not_written_to_its_end(path, tmp_path, files, monkeypatch):
    """Which array_record does not always say."""
    with monkeypatch.context() as patch:
        patch.setattr("fdm_jax.data.builders.ArrayRecordReader.num_records", lambda _: 6)
        with pytest.raises(OSError, match="zip-train.array_record-00000-of-00001 was not written to its end"):
            prepare_dataset(Request(name="zip", source=path(files)), tmp_path / "data")
    assert not list((tmp_path / "data" / "zip").rglob("*.json"))
    assert len(prepared(tmp_path / "data", "zip", path(files))) == 7


KILLED = """
import os, sys, pathlib
from fdm_jax.data import raw
from fdm_jax.data.preparing import Request, prepare_dataset
read = raw.PictureSplit.read
raw.PictureSplit.read = lambda self, i: os._exit(9) if i == 5 else read(self, i)
prepare_dataset(Request(name="zip", source=pathlib.Path(sys.argv[1]), threads=1), pathlib.Path(sys.argv[2]))
"""


def test_killed_in_the_middle_and_begun_again(path, tmp_path, files, pixels):
    source, data_dir = path(files), tmp_path / "data"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(source), str(data_dir)], capture_output=True)
    assert killed.returncode == 9
    remains = list((data_dir / "zip" / "a").iterdir())
    assert [path.name.split(".")[0] for path in remains] == ["incomplete"]
    with pytest.raises(UserError, match="zip/a is not prepared in .*`fdm dataset prepare zip --source=.*--data_dir="):
        open_source("zip/a", data_dir=data_dir)
    np.testing.assert_array_equal(prepared(data_dir, "zip", source).read(range(7))["image"], pixels)
    assert [path.name for path in (data_dir / "zip" / "a").iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
    "name", ["zip-train.array_record-00000-of-00001", "dataset_info.json", "features.json", "metadata.json"]
)
def test_damaged_files(path, tmp_path, files, name):
    folder, _ = prepare_dataset(Request(name="zip", source=path(files)), tmp_path / "data")
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(UserError, match=r"data set in .*1\.0\.0 cannot be read \(.+\): if it is damaged, delete that"):
        open_source(folder).read(range(7))


def test_a_sound_set_that_cannot_be_read_is_not_called_damaged(path, tmp_path, files):
    """It would be deleted in vain."""
    folder, _ = prepare_dataset(Request(name="zip", source=path(files)), tmp_path / "data")
    source = open_source(folder, cache_mb=0)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), before[1]))
        try:
            with pytest.raises(UserError, match=r"cannot be read \(.*Too many open files[^:]*\.$") as caught:
                source.read([0])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert file_trouble(caught.value).sentence.endswith("let more files be open (`ulimit -n`)")


def test_not_prepared_and_not_right(path, tmp_path, files):
    for name, words in (
        (
            "cifar10",
            "cifar10 is not prepared in .*nothing is downloaded: .*prepare cifar10 --source=cifar-10-python.tar.gz",
        ),
        ("folder/cats", "folder/cats is not prepared in"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(name, data_dir=tmp_path)
    source = path(files)
    refused("cifar10 is always made in one way", tmp_path, "cifar10", source, resolution=16)
    refused("ffhq64 is always made in one way", tmp_path, "ffhq64", source, transform="center-crop")
    refused("--resolution must be from 1 to 4096, and is 0", tmp_path, "folder", source, resolution=0)
    refused("cannot be the name of a data set", tmp_path, "folder", source, config="../x")
    refused("no zip file or folder is at", tmp_path / "data", "folder", tmp_path / "nowhere")
    refused("no file or folder is at", tmp_path / "data", "cifar10", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds no image files", tmp_path / "data", "folder", tmp_path / "empty")


def test_no_space(path, tmp_path, files, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100))
    refused("0 MiB left, and 1 are needed: make room", tmp_path / "data", "zip", path(files))


def test_splits(path, tmp_path):
    _, files = mnist_files()
    prepared(tmp_path, "mnist", path(files))
    for split, count in (("train", 5), ("test", 2), ("all", 7), ("train[:3]", 3), ("train+test", 7)):
        assert len(open_source("mnist", split=split, data_dir=tmp_path)) == count
    for split, words in (
        ("val", "mnist has no split 'val': choose one of train, test, all"),
        ("train[:x]", "cannot be had"),
        ("[1]", "cannot be had"),
    ):
        with pytest.raises(UserError, match=f"{words}[^\n]*$"):
            open_source("mnist", split=split, data_dir=tmp_path)


@pytest.mark.parametrize("labelled", [True, False])
def test_export_and_back(path, tmp_path, pixels, labelled, monkeypatch):
    files = {f"{'cat dog'.split()[i % 2]}/{i}.png": png(image) for i, image in enumerate(pixels)}
    source = prepared(tmp_path / "data", "folder", path(files), labels="auto" if labelled else "none")
    out = tmp_path / "out.zip"
    write_zip(source, out)
    back = open_source(out, use_labels=labelled)
    for key in ("image", "label"):
        np.testing.assert_array_equal(back.read(range(7))[key], source.read(range(7))[key])
    assert back.spec.class_names == source.spec.class_names
    again = prepared(tmp_path / "data", "zip", out)
    np.testing.assert_array_equal(again.read(range(7))["image"], source.read(range(7))["image"])
    # What EDM's own loader looks for.
    import zipfile

    with zipfile.ZipFile(out) as inside:
        names = [name for name in inside.namelist() if name != "dataset.json"]
        assert names == [f"00000/img{i:08d}.png" for i in range(7)]
        labels = json.loads(inside.read("dataset.json"))["labels"]
    assert labels == ([[name, i // 4] for i, name in enumerate(names)] if labelled else None)
    with pytest.raises(UserError, match="out.zip is there already"):
        write_zip(source, out)
    with pytest.raises(UserError, match="out.zip/in.zip cannot be written"):
        write_zip(source, out / "in.zip")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="new.zip cannot be written: Read-only file"):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS))))
        write_zip(source, tmp_path / "new.zip")
    assert sorted(p.name for p in tmp_path.glob("*out*")) == ["out.zip"]
