"""Data on Google Cloud Storage: what is opened is what is there, copied once, and whole or not at all."""

import concurrent.futures
import errno
import pathlib

import numpy as np
import pytest

from fdm_jax.data import staging
from fdm_jax.data.digits import prepare_digits
from fdm_jax.data.opening import open_source
from fdm_jax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fdm_jax" / "gs"


def downloads(store):
    return sum(request.startswith("GET /download/") for request in store.requests)


def assert_alike(a, b):
    assert len(a) == len(b) and a.spec.num_classes == b.spec.num_classes
    rows = np.arange(len(a))
    for name, values in a.read(rows).items():
        np.testing.assert_array_equal(values, b.read(rows)[name])


def test_zip_is_copied_once_and_again_when_it_changes(store, archives, files, cache):
    local = archives.zip(files)
    store.put("bucket", "sets/a.zip", pathlib.Path(local).read_bytes())
    opened = open_source("gs://bucket/sets/a.zip")
    assert_alike(opened, open_source(local))
    assert opened.spec.name == "a"
    before = downloads(store)
    assert_alike(open_source("gs://bucket/sets/a.zip"), open_source(local))
    assert downloads(store) == before
    fewer = archives.zip({name: data for name, data in list(files.items())[:3]}, "fewer.zip")
    store.put("bucket", "sets/a.zip", pathlib.Path(fewer).read_bytes())
    assert len(open_source("gs://bucket/sets/a.zip", use_labels=False)) == 3
    assert not list(cache.glob("*.part.*"))


def test_folder(store, archives, files):
    local = archives.dir(files)
    store.upload(pathlib.Path(local), "bucket", "sets/folder/")
    for name in ("sets/folder/", "sets/folder/00000/"):  # as made in Google's console
        store.put("bucket", name, b"")
    assert_alike(open_source("gs://bucket/sets/folder"), open_source(local))


def test_prepared_set_by_path_and_by_name(store, tmp_path):
    folder = prepare_digits(tmp_path / "data")
    store.upload(folder.parent, "bucket", "data/digits/")
    for source, data_dir in (("gs://bucket/data/digits", None), ("gs://bucket/data/digits/1.0.0/", None)):
        opened = open_source(source, data_dir=data_dir, split="test")
        assert_alike(opened, open_source(str(folder), split="test"))
        assert opened.spec.name == "digits"
    store.upload(folder.parent, "bucket", "named/ours/")
    assert_alike(open_source("ours", data_dir="gs://bucket/named"), open_source(str(folder)))


def test_several_at_once_copy_once(store, archives, files):
    content = pathlib.Path(archives.zip(files)).read_bytes()
    store.put("bucket", "sets/shared.zip", content)
    before = downloads(store)
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        sources = list(threads.map(open_source, ["gs://bucket/sets/shared.zip"] * 4))
    assert all(len(source) == 7 for source in sources)
    assert downloads(store) == before + 1


@pytest.mark.parametrize("without", [(), ("md5Hash",)])  # composed objects have no MD5
def test_what_does_not_arrive_whole_is_not_kept(store, archives, files, cache, without):
    content = pathlib.Path(archives.zip(files)).read_bytes()
    metadata = store.put("bucket", "sets/hurt.zip", content)
    metadata = {name: value for name, value in metadata.items() if name not in without}
    store.objects["bucket", "sets/hurt.zip"] = content[:-1] + b"x", metadata
    with pytest.raises(UserError, match="gs://bucket/sets/hurt.zip changed while it was copied, or was damaged"):
        open_source("gs://bucket/sets/hurt.zip")
    assert not list(cache.glob("*.part.*")) and not list(cache.glob("*/hurt.zip"))
    store.objects["bucket", "sets/hurt.zip"] = content, metadata
    assert len(open_source("gs://bucket/sets/hurt.zip")) == 7


def test_a_full_disk_leaves_nothing_of_the_copy(store, archives, files, cache, monkeypatch):
    store.put("bucket", "sets/a.zip", pathlib.Path(archives.zip(files)).read_bytes())

    def fill(path, objects, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device"):
        patched.setattr(staging, "_fetch", fill)
        open_source("gs://bucket/sets/a.zip")
    assert not list(cache.glob("*/a.zip"))
    assert len(open_source("gs://bucket/sets/a.zip")) == 7


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("gs://bucket/nothing.zip", "There is nothing at gs://bucket/nothing.zip"),
        ("gs://elsewhere/a.zip", "There is nothing at gs://elsewhere/a.zip"),
        ("gs://", "names no bucket"),
        ("s3://bucket/a.zip", "s3://bucket/a.zip cannot be used: give a local path, or one on Google Cloud Storage"),
    ],
)
def test_refusals(store, source, sentence):
    with pytest.raises(UserError, match=sentence):
        open_source(source)
