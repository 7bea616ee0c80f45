"""Zips and folders against images written by hand; the wrappers against plain indexing."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from encoded import png

from fdm_jax.data.archives import open_archive
from fdm_jax.data.opening import open_source
from fdm_jax.data.sources import Cached, FileSource, Subset, XFlip


@pytest.fixture(params=["zip", "dir"])
def path(request, archives, files):
    return getattr(archives, request.param)(files)


@pytest.fixture
def source(archives, files):
    return FileSource(open_archive(archives.zip(files)))


def test_zip_and_folder(path, pixels):
    source = open_source(path)
    spec = source.spec
    assert (spec.name, spec.num_images, spec.resolution, spec.channels, spec.num_classes) == ("a", 7, 4, 3, 3)
    assert len(source) == 7
    batch = source.read(range(7))  # in the order of the names, each with its own label
    np.testing.assert_array_equal(batch["image"], pixels)
    np.testing.assert_array_equal(batch["label"], np.arange(7) % 3)
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(source.read([5, 0, 5])["image"], pixels[[5, 0, 5]])


def test_files_at_any_depth_of_any_known_kind_and_nothing_else(archives, pixels, tmp_path):
    grey = pixels[:3, ..., 0]
    path = archives.dir({"notes.txt": b"", ".DS_Store": b"", "__MACOSX/._b.png": b"junk", ".hidden/x.png": b"junk"})
    (tmp_path / "a" / "deep" / "er").mkdir(parents=True)
    for name, image in zip(["b.PNG", "deep/er/c.bmp", "a.tiff"], grey, strict=True):
        PIL.Image.fromarray(image).save(tmp_path / "a" / name)
    source = open_source(path, use_labels=False)
    assert (source.spec.num_images, source.spec.channels, source.spec.num_classes) == (3, 1, 0)
    batch = source.read([0, 1, 2])
    np.testing.assert_array_equal(batch["image"][..., 0], grey[[2, 0, 1]])
    assert batch["image"].shape == (3, 4, 4, 1) and not batch["label"].any()


def test_what_macos_adds_to_a_zip_is_no_image(archives, pixels):
    by_macos = {"__MACOSX/cat/._1.png": b"junk", "cat/.DS_Store": b"", "cat/._1.png": b"junk"}
    source = open_source(
        archives.zip({"cat/": b"", "cat/1.png": png(pixels[0]), "dog/2.png": png(pixels[1])} | by_macos)
    )
    assert source.spec.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.read(range(len(source)))["image"], pixels[:2])


@pytest.mark.parametrize("changed", [0, 70_000, 199_999])
def test_the_mark_of_a_folder_sees_both_ends_of_a_file(archives, changed):
    """And not its middle, so as not to read all; its name and size always."""
    data = bytearray(200_000)
    before = open_archive(archives.dir({"1.bmp": data})).mark(["1.bmp"])
    data[changed] = 1
    assert (open_archive(archives.dir({"1.bmp": data})).mark(["1.bmp"]) == before) == (changed == 70_000)


def test_links_to_folders_are_followed_but_not_in_circles(archives, pixels, tmp_path):
    path = archives.dir({"cat/1.png": png(pixels[0])})
    archives.dir({"2.png": png(pixels[1]), "deep/3.png": png(pixels[2])}, "elsewhere")
    (tmp_path / "a" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "owl").symlink_to("../elsewhere/deep")  # twice the same picture, but no circle
    source = open_source(path)
    assert source.spec.class_names == ("cat", "dog", "owl")
    np.testing.assert_array_equal(source.read(range(4))["image"], pixels[[0, 1, 2, 2]])
    (tmp_path / "elsewhere" / "deep" / "again").symlink_to("..")
    (tmp_path / "a" / "cat" / "up").symlink_to(tmp_path / "a")
    assert open_archive(path).names() == ["cat/1.png", "dog/2.png", "dog/deep/3.png", "owl/3.png", "owl/again/2.png"]


def test_labels_written_with_backslashes(archives, files, pixels):
    written = files["dataset.json"].replace(b"0/img", b"0\\\\img")
    source = open_source(archives.zip(files | {"dataset.json": written}))
    assert source.read(range(3))["label"].tolist() == [0, 1, 2]


def test_without_labels_dataset_json_is_not_looked_at(archives, files):
    source = open_source(archives.zip(files | {"dataset.json": b"{"}), use_labels=False)
    assert source.spec.num_classes == 0 and not source.read(range(7))["label"].any()


def test_xflip(path, pixels):
    source = open_source(path, xflip=True)
    assert len(source) == source.spec.num_images == 14
    batch = source.read(np.arange(14))
    np.testing.assert_array_equal(batch["image"][:7], pixels)
    np.testing.assert_array_equal(batch["image"][7:], pixels[:, :, ::-1])
    np.testing.assert_array_equal(batch["label"], [i % 3 for i in range(7)] * 2)
    np.testing.assert_array_equal(source.read([3])["image"], pixels[[3]])  # the cache was not mirrored in place


def test_subset_is_that_of_the_reference(source, pixels):
    order = np.arange(7)  # as EDM's dataset picks max_size images
    np.random.RandomState(5).shuffle(order)
    np.testing.assert_array_equal(Subset(source, 4, seed=5).read(range(4))["image"], pixels[np.sort(order[:4])])
    assert len(Subset(source, 100)) == 7
    assert Subset(source, 1).spec.num_classes == 3


def test_cache_gives_the_same_and_reads_once(source, pixels):
    reads = []

    class Counted(FileSource):
        def __init__(self):
            self.spec = source.spec

        def read(self, indices):
            reads.extend(np.asarray(indices).tolist())
            return source.read(indices)

    cached = Cached(Counted())
    for indices in ([2, 2, 0], [0, 1, 2], range(7)):
        batch = cached.read(indices)
        np.testing.assert_array_equal(batch["image"], pixels[list(indices)])
        np.testing.assert_array_equal(batch["label"], np.array(indices) % 3)
        batch["image"][:] = 0  # what is handed out is the caller's own
    assert sorted(reads) == list(range(7))


def test_cache_only_if_all_images_fit(archives, files):
    path = archives.zip(files)
    assert isinstance(open_source(path), Cached)
    assert isinstance(open_source(path, cache_mb=0), FileSource)
    assert isinstance(open_source(path, max_images=3, xflip=True), XFlip)


@pytest.mark.parametrize("cache_mb", [0, 1])
def test_threads(archives, files, pixels, cache_mb):
    source = open_source(archives.zip(files), cache_mb=cache_mb)
    orders = np.random.RandomState(1).randint(0, 7, (100, 8))
    with ThreadPoolExecutor(8) as pool:
        for order, batch in zip(orders, pool.map(source.read, orders), strict=True):
            np.testing.assert_array_equal(batch["image"], pixels[order])


def test_pickled_copy(path, pixels):
    source = open_source(path, xflip=True)
    source.read([0])
    copy = pickle.loads(pickle.dumps(source))
    assert copy.spec == source.spec
    np.testing.assert_array_equal(copy.read(range(7))["image"], pixels)


def _read_often(source, pixels, failed):
    for i in np.random.RandomState(2).randint(0, 7, 300):
        if not np.array_equal(source.read([i])["image"][0], pixels[i]):
            failed.set()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_children_do_not_share_the_file_position(source, pixels):
    fork = multiprocessing.get_context("fork")
    failed = fork.Event()
    children = [fork.Process(target=_read_often, args=(source, pixels, failed)) for _ in range(2)]
    for child in children:
        child.start()
    _read_often(source, pixels, failed)
    for child in children:
        child.join(30)
    assert not failed.is_set() and all(child.exitcode == 0 for child in children)
