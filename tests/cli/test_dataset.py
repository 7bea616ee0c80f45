"""`fdm dataset`: what it prints, writes and refuses, and training on what it made."""

import errno
import json
import os

import numpy as np
import PIL.Image
import pytest
import tiny
from data.conftest import Archives
from encoded import png

from fdm_jax.cli.main import main

RNG = np.random.RandomState(0)
IMAGES = RNG.randint(0, 256, (40, 8, 8, 1), np.uint8)
LABELS = np.arange(40) % 3


@pytest.fixture
def photos(tmp_path):
    """Forty grey pictures in folders of three classes."""
    for i, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = tmp_path / "photos" / ("cat", "dog", "owl")[label] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image[..., 0]))
    return tmp_path / "photos"


def fdm(*arguments):
    return main(["dataset", *map(str, arguments)])


def test_from_photos_to_a_prepared_set(photos, tmp_path, capsys):
    data_dir = tmp_path / "of mine"  # what is printed goes into a shell
    assert fdm("prepare", "folder", f"--source={photos}", f"--data_dir={data_dir}") == 0
    said = capsys.readouterr().out
    assert "folder/photos, 40 images of 8x8x1, 3 classes (cat, dog, owl) (40 train)" in said
    assert f"--config.data.source=folder/photos --config.data.data_dir='{data_dir}'" in said
    assert fdm("prepare", "folder", f"--source={photos}", f"--data_dir={data_dir}") == 0  # again: nothing to do
    assert "(40 train), before: delete" in capsys.readouterr().out

    out = tmp_path / "grid.png"
    assert fdm("stats", "folder/photos", f"--data_dir={data_dir}", "--json", f"--out={out}") == 0
    numbers = json.loads(capsys.readouterr().out)
    values = IMAGES / 127.5 - 1
    assert numbers["classes"] == {"cat": 14, "dog": 13, "owl": 13} and numbers["images"] == 40
    np.testing.assert_allclose(numbers["mean"], [values.mean()], rtol=1e-12)
    np.testing.assert_allclose([numbers["sigma_data"], *numbers["std"]], values.std(), rtol=1e-12)
    assert len(numbers["metadata"]["sha256"]) == 64
    grid = np.asarray(PIL.Image.open(out))
    scale = 64 // 8
    assert grid.shape == (scale * (8 * 9 + 1), scale * (3 * 9 + 1))
    for column in range(3):  # a class in each, from the top
        cell = grid[scale : 9 * scale : scale, scale * (1 + 9 * column) : scale * 9 * (column + 1) : scale]
        np.testing.assert_array_equal(cell, IMAGES[column][..., 0])

    assert fdm("stats", "folder/photos", f"--data_dir={data_dir}") == 0
    table = capsys.readouterr().out
    assert "1  dog" in table and f"--config.family.sigma_data={values.std():.3g}" in table

    exported = tmp_path / "photos.zip"
    assert fdm("export", "folder/photos", f"--data_dir={data_dir}", f"--out={exported}") == 0
    assert "40 images" in capsys.readouterr().out


@pytest.mark.slow
def test_every_form_of_the_data_trains(photos, tmp_path, capsys):
    """The same order and pixels: a run goes on from one form of the data to another."""
    data_dir, exported = tmp_path / "data", tmp_path / "photos.zip"
    assert fdm("prepare", "folder", f"--source={photos}", f"--data_dir={data_dir}") == 0
    assert fdm("export", "folder/photos", f"--data_dir={data_dir}", f"--out={exported}") == 0
    capsys.readouterr()
    prepared = data_dir / "folder" / "photos" / "1.0.0"
    shape = ["--config.data.num_classes=3", "--config.log.every_images=16"]
    for images, source in ((32, prepared), (64, exported), (96, photos)):
        arguments = tiny.arguments(tmp_path / "run", f"--config.data.source={source}", *shape)
        arguments.append(f"--config.train.images={images}")
        assert main([*arguments, "--dry-run"]) == 0
        assert "40 images of 8x8x1, 3 classes" in capsys.readouterr().out
        assert main(arguments) == 0
        said = capsys.readouterr()
        assert images == 32 or f"Going on from step {images // 16 - 2}" in said.err

    made = [tmp_path / name for name in ("dog.npz", "1.npz")]
    for path in made:
        arguments = [f"--workdir={tmp_path / 'run'}", "--seeds=0-7", "--steps=2", f"--class={path.stem}"]
        assert main(["generate", *arguments, f"--out={path}"]) == 0
    by_name, by_number = map(np.load, made)
    np.testing.assert_array_equal(by_name["label"], [1] * 8)
    np.testing.assert_array_equal(by_name["image"], by_number["image"])
    assert main(["generate", *arguments[:-1], "--class=dag", f"--out={tmp_path / 'x.png'}"]) == 2
    assert "knows no class 'dag': did you mean 'dog'?" in capsys.readouterr().err


def test_classes_that_the_data_lack_are_named(photos, tmp_path, capsys):
    arguments = tiny.arguments(tmp_path / "run", f"--config.data.source={photos}", "--config.data.num_classes=10")
    assert main([*arguments, "--dry-run"]) == 0
    assert "the network is for 10 classes and the data have 3" in capsys.readouterr().err


def test_attention_at_no_level_is_named(photos, tmp_path, capsys):
    arguments = tiny.arguments(tmp_path / "run", f"--config.data.source={photos}")
    assert main([*arguments, "--dry-run"]) == 0
    assert "attn_resolutions" not in capsys.readouterr().err
    assert main([*arguments, "--config.network.attn_resolutions=(16,)", "--dry-run"]) == 0
    assert "network.attn_resolutions names 16, and the network's resolutions are [8]" in capsys.readouterr().err


def test_statistics_of_three_channels_without_classes(archives_zip, capsys):
    pixels = RNG.randint(0, 256, (9, 4, 4, 3), np.uint8)
    source = archives_zip({f"{i}.png": png(image) for i, image in enumerate(pixels)})
    assert fdm("stats", source, "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    values = pixels / 127.5 - 1
    np.testing.assert_allclose(numbers["mean"], values.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(numbers["std"], values.std(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(numbers["sigma_data"], values.std(), rtol=1e-12)
    assert numbers["classes"] == {}
    assert fdm("stats", source) == 0
    said = capsys.readouterr().out
    assert "no classes" in said and f"--config.family.sigma_data={values.std():.3g} " in said
    assert fdm("stats", archives_zip({"0.png": png(np.full((4, 4, 3), 7, np.uint8))})) == 0
    assert "  0.0000: all pictures are of one colour\n" in capsys.readouterr().out


@pytest.mark.parametrize("labels, sentence", [("[]", "no label for a.png"), ('[["a.png", "cat"]]', "whole number")])
def test_labels_that_are_not_right_are_not_left_out_in_silence(archives_zip, tmp_path, capsys, labels, sentence):
    files = {"a.png": png(IMAGES[0, ..., 0]), "dataset.json": f'{{"labels": {labels}}}'.encode()}
    assert fdm("export", archives_zip(files), f"--out={tmp_path / 'out.zip'}") == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out.zip").exists()
    for content in ({}, {"dataset.json": b'{"labels": null}'}):
        assert fdm("stats", archives_zip({"a.png": files["a.png"]} | content)) == 0
        assert "no classes" in capsys.readouterr().out


@pytest.fixture
def archives_zip(tmp_path):
    return Archives(tmp_path).zip


def test_bad_pictures_are_counted(photos, tmp_path, capsys):
    (photos / "dog" / "zero.png").write_bytes(b"")
    arguments = ("prepare", "folder", f"--source={photos}", f"--data_dir={tmp_path / 'data'}")
    assert fdm(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("fdm dataset: dog/zero.png in ") and "the file is empty" in said[-1]
    assert fdm(*arguments, "--skip-bad") == 0
    said = capsys.readouterr()
    assert "Left out: dog/zero.png" in said.err and "Left out in all: 1 bad" in said.out and "(40 train)" in said.out


def test_small_pictures_are_enlarged_but_not_in_silence(photos, tmp_path, capsys):
    (photos / "dog" / "large.png").write_bytes(png(np.repeat(np.repeat(IMAGES[0, ..., 0], 2, 0), 2, 1)))
    arguments = ("prepare", "folder", f"--source={photos}")
    assert fdm(*arguments, f"--data_dir={tmp_path / 'a'}", "--resolution=12") == 0
    assert "Enlarged: 40 of the pictures are smaller than 12 pixels" in capsys.readouterr().err
    assert fdm(*arguments, f"--data_dir={tmp_path / 'a'}", "--resolution=12") == 0  # there already
    assert "Enlarged" not in capsys.readouterr().err
    assert fdm(*arguments, f"--data_dir={tmp_path / 'b'}", "--resolution=8") == 0
    assert "Enlarged" not in capsys.readouterr().err


def test_bench_prints_a_line_for_each_combination(photos, capsys):
    assert fdm("bench", photos, "--batch-size=4,8", "--threads=1,2", "--images=64", "--cache-mb=1") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["batch_size"], line["threads"]) for line in lines] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert all(line["images_per_second"] > 0 and line["max_rss_mib"] > 10 for line in lines)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["prepare", "cifar10", "--source=/nowhere/c.tar.gz"], "no file or folder is at /nowhere/c.tar.gz"),
        (["prepare", "folder", "--source=/nowhere"], "no zip file or folder is at /nowhere"),
        (["prepare", "ffhq64", "--source=x", "--resolution=128"], "ffhq64 is always made in one way"),
        (["prepare", "folder", "--source=x", "--threads=0"], "--threads must be from 1 to 1024, and is 0"),
        (["stats", "cifar10"], "cifar10 is not prepared in"),
        (["stats", "nothing"], "no data set, zip or folder is called 'nothing'"),
        (["stats", "digits", "--out=config.json"], "--out must end in .png, and is config.json"),
        (["bench", "digits", "--batch-size=64,x"], "--batch-size must be whole numbers from 1"),
        (["bench", "digits", "--workers=-1"], "--workers must be whole numbers from 0"),
        (["export", "digits", "--out=digits.tar"], "--out must end in .zip"),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert fdm(*arguments) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("fdm dataset: ") and sentence in said[0]


def test_a_user_without_a_home(capsys, monkeypatch):
    """Its number alone is known, as in many a container."""
    for variable in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.path.expanduser", os.fspath)
    assert fdm("stats", "cifar10") == 2
    assert "Set HOME, or XDG_CACHE_HOME, to a folder" in capsys.readouterr().err


def test_data_dir_that_cannot_be_written(capsys, photos, tmp_path):
    (tmp_path / "file").write_text("")
    assert fdm("prepare", "folder", f"--source={photos}", f"--data_dir={tmp_path / 'file'}") == 2
    said = capsys.readouterr().err
    assert "folder/photos cannot be prepared in" in said and f"'{tmp_path / 'file'}" in said


def test_data_dir_whose_name_is_not_utf_8(capsys, photos, tmp_path):
    """array_record would not find its way there."""
    data_dir = tmp_path / os.fsdecode(b"caf\xe9")
    assert fdm("prepare", "folder", f"--source={photos}", f"--data_dir={data_dir}") == 2
    assert "bytes that are not UTF-8, and cannot hold data" in capsys.readouterr().err


def test_sources_that_may_not_be_read(capsys, photos, tmp_path, monkeypatch):
    def closed(path):  # root, as whom tests may run, may read anything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("fdm_jax.data.opening.open_archive", closed)
    monkeypatch.setattr("fdm_jax.data.preparing.open_archive", closed)
    assert fdm("stats", photos) == 2
    assert f"{photos} cannot be read or written (Permission denied)." in capsys.readouterr().err
    assert fdm("prepare", "folder", f"--source={photos}", f"--data_dir={tmp_path}") == 2
    assert str(photos) in capsys.readouterr().err


def test_digits_prepare_themselves(capsys, tmp_path):
    assert fdm("stats", "digits", "--split=all", f"--data_dir={tmp_path}") == 0
    said = capsys.readouterr().out
    assert "1,797 images of 8x8x1, 10 classes" in said and "grey" in said
