"""CIFAR-10's archives, written here byte by byte as Python 2 and its authors wrote them."""

import gzip
import io
import os
import pathlib
import pickle
import struct
import tarfile

import numpy as np
import pytest

from fdm_jax.data.cifar import BATCHES, CLASS_NAMES, read_cifar10
from fdm_jax.errors import UserError

N = 7  # images per batch
NAMES = [name for names in BATCHES.values() for name in names]


def py2(value):
    """Pickle opcodes of protocol 2 as Python 2 chooses them: its strings are bytes."""
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<I", len(value))) + value
    if isinstance(value, int):
        return b"K" + bytes([value]) if 0 <= value < 256 else b"J" + struct.pack("<i", value)
    if isinstance(value, list):
        return b"](" + b"".join(map(py2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(py2(k) + py2(v) for k, v in value.items()) + b"u"
    assert value.dtype == np.uint8
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(py2, value.shape)) + b"t"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return empty + b"(K\x01" + shape + dtype + b"I00\n" + py2(value.tobytes()) + b"tb"


def batch(name, **changed):
    """The pixels and labels of a batch, and its pickle."""
    rng = np.random.RandomState(NAMES.index(name))
    content = {
        b"batch_label": b"training batch 1 of 5",
        b"labels": [int(i) for i in rng.randint(0, 10, N)],
        b"data": rng.randint(0, 256, (N, 3072)).astype(np.uint8),
        b"filenames": [b"leptodactylus_pentadactylus_s_%06d.png" % i for i in range(N)],
    }
    content |= {key.encode(): value for key, value in changed.items()}
    return content, b"\x80\x02" + py2(content) + b"."


def python_files(**changed):
    files = {f"cifar-10-batches-py/{name}": batch(name)[1] for name in NAMES}
    files["cifar-10-batches-py/readme.html"] = b"<meta>"
    return files | {f"cifar-10-batches-py/{name}": data for name, data in changed.items()}


def binary_files(**changed):
    files = {}
    for name in NAMES:
        content = batch(name)[0]
        rows = zip(content[b"labels"], content[b"data"], strict=True)
        files[f"cifar-10-batches-bin/{name}.bin"] = b"".join(bytes([i]) + row.tobytes() for i, row in rows)
    return files | {f"cifar-10-batches-bin/{name}.bin": data for name, data in changed.items()}


def tar(path, files):
    with tarfile.open(path, "w:gz") as out:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return path


def folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def test_the_pickles_here_are_what_python_reads():
    content, data = batch("test_batch")
    read = pickle.loads(data, encoding="bytes")
    np.testing.assert_array_equal(read[b"data"], content[b"data"])
    assert read[b"labels"] == content[b"labels"] and read[b"filenames"] == content[b"filenames"]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: tar(path / "cifar-10-python.tar.gz", python_files()),
        lambda path: tar(path / "cifar-10-binary.tar.gz", binary_files()),
        lambda path: folder(path, python_files()),
        lambda path: folder(path, python_files()) / "cifar-10-batches-py",
        lambda path: folder(path, binary_files()),
    ],
    ids=["python", "binary", "unpacked", "inner folder", "unpacked binary"],
)
def test_images_and_labels(tmp_path, make):
    raw = read_cifar10(make(tmp_path))
    assert (raw.resolution, raw.channels, raw.num_classes, raw.class_names) == (32, 3, 10, CLASS_NAMES)
    assert {name: len(split) for name, split in raw.splits.items()} == {"train": 5 * N, "test": N}
    for split, names in BATCHES.items():
        contents = [batch(name)[0] for name in names]
        # A row holds all reds, then all greens, then all blues, each line by line.
        expected = np.concatenate([c[b"data"] for c in contents]).reshape(-1, 3, 32, 32)
        for i, planes in enumerate(expected):
            np.testing.assert_array_equal(raw.splits[split].read(i), np.stack(planes, axis=-1))
        np.testing.assert_array_equal(raw.splits[split].labels, np.concatenate([c[b"labels"] for c in contents]))
    assert len(raw.checksum()) == 64


def fails(words, path):
    with pytest.raises(UserError, match=words) as caught:
        read_cifar10(path)
    assert "\n" not in str(caught.value)


def test_truncated_and_damaged_archives(tmp_path):
    whole = tar(tmp_path / "c.tar.gz", python_files()).read_bytes()
    for length in (len(whole) - 8, len(whole) // 2, 40, 0):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:length])
        fails("cut.tar.gz cannot be read to its end.*cut short, damaged or no tar", tmp_path / "cut.tar.gz")
    (tmp_path / "cut.tar").write_bytes(gzip.decompress(whole)[:40_000])
    fails("cut.tar cannot be read to its end|is missing from", tmp_path / "cut.tar")
    fails(r"cut.tar.gz cannot be read to its end \([^():]*\): it is", tmp_path / "cut.tar.gz")  # now empty
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (tmp_path / "flip.tar.gz").write_bytes(flipped)
    fails("flip.tar.gz", tmp_path / "flip.tar.gz")
    fails("no file or folder is at .*nowhere", tmp_path / "nowhere")


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "data_batch_3 .*not a batch of CIFAR-10, or a damaged one"),
        (batch("data_batch_3")[1][:-500], "data_batch_3 .*not a batch of CIFAR-10, or a damaged one"),
        (
            batch("data_batch_3", data=np.zeros((N, 3071), np.uint8))[1],
            "data_batch_3 .*no array of 3072 bytes per image",
        ),
        (batch("data_batch_3", labels=[0] * (N - 1))[1], "data_batch_3 .*no list of 7 labels"),
        (batch("data_batch_3", labels=[0] * (N - 1) + [10])[1], "data_batch_3 .*image 6 the label 10.*0 to 9"),
        (batch("data_batch_3", labels=[0] * (N - 1) + [-1])[1], "image 6 the label -1"),
        (b"\x80\x02}.", "data_batch_3"),
    ],
)
def test_bad_batches(tmp_path, data, words):
    fails(words, tar(tmp_path / "c.tar.gz", python_files(data_batch_3=data)))


def test_bad_binary_batches(tmp_path):
    cut = binary_files()["cifar-10-batches-bin/test_batch.bin"][:-1]
    fails("test_batch.bin .*no multiple of 3,073", tar(tmp_path / "c.tar.gz", binary_files(test_batch=cut)))
    fails("test_batch.bin in .* has 0 bytes", tar(tmp_path / "e.tar.gz", binary_files(test_batch=b"")))
    wrong = b"\x0a" + bytes(3072)
    fails("image 0 the label 10", tar(tmp_path / "d.tar.gz", binary_files(test_batch=wrong)))


def test_missing_batch(tmp_path):
    files = python_files()
    del files["cifar-10-batches-py/data_batch_4"]
    fails("data_batch_4 is missing from .*not the whole", tar(tmp_path / "c.tar.gz", files))


class Hostile:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_pickles_that_would_run_something(tmp_path):
    mark = tmp_path / "mark"
    for attack in (
        Hostile(os.system, f"touch {mark}"),
        Hostile(eval, f"open({str(mark)!r}, 'w')"),
        Hostile(pathlib.Path.touch, mark),
        Hostile(np.save, mark, np.zeros(1)),
        {b"data": Hostile(exec, f"open({str(mark)!r}, 'w')"), b"labels": []},
    ):
        data = pickle.dumps(attack, protocol=2)
        fails("test_batch .*it asks for", tar(tmp_path / "c.tar.gz", python_files(test_batch=data)))
    assert not list(tmp_path.glob("mark*"))


def test_archives_made_to_do_harm(tmp_path):
    for name in ("../data_batch_1", "/data_batch_1", "a/../../data_batch_1"):
        fails("leads out of the archive", tar(tmp_path / "c.tar.gz", python_files() | {name: b""}))
    with tarfile.open(tmp_path / "twice.tar.gz", "w:gz") as out:
        for _ in range(2):
            out.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"))
    fails("two files called", tmp_path / "twice.tar.gz")
    # A header that claims 100 GB, followed by nothing: refused before any of it would be unpacked.
    entry = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    entry.size = 100 * 2**30
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(entry.tobuf(tarfile.GNU_FORMAT)))
    fails("claims to hold 107,374,182,400", tmp_path / "bomb.tar.gz")
