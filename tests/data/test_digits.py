"""The digits builder against scikit-learn's own arrays, and its preparation against interruption."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import sklearn.model_selection

from fdm_jax.data.digits import Digits, load_digits_arrays, prepare_digits
from fdm_jax.data.opening import open_source
from fdm_jax.errors import UserError


def whole(data_dir):
    return sorted(p.name for p in (Path(data_dir) / "digits").iterdir())


def test_images_and_labels_are_those_of_scikit_learn(data_dir, capfd):
    raw, target = sklearn.datasets.load_digits(return_X_y=True)
    raw = raw.reshape(-1, 8, 8, 1)
    train_x, test_x, train_y, test_y = sklearn.model_selection.train_test_split(
        raw, target, test_size=297, stratify=target, random_state=0
    )
    capfd.readouterr()
    for split, x, y in [("train", train_x, train_y), ("test", test_x, test_y)]:
        images, labels = load_digits_arrays(split, data_dir)
        assert images.dtype == np.uint8 and images.shape == x.shape and labels.dtype == np.int32
        np.testing.assert_array_equal(np.rint(images * (16 / 255)), x)  # sixteen grey levels survive
        assert images.max() == 255 and images.min() == 0
        np.testing.assert_array_equal(labels, y)
    assert capfd.readouterr() == ("", "")  # TFDS announces nothing


def test_both_splits_together_are_all_images(data_dir):
    images, labels = load_digits_arrays("all", data_dir)
    raw, target = sklearn.datasets.load_digits(return_X_y=True)
    ours = np.column_stack([labels, np.rint(images.reshape(-1, 64) * (16 / 255))])
    theirs = np.column_stack([target, raw])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    np.testing.assert_array_equal(images, load_digits_arrays("train+test", data_dir)[0])


def test_source(data_dir):
    source = open_source("digits", split="test", data_dir=data_dir)
    spec = source.spec
    assert (spec.name, spec.num_images, spec.resolution, spec.channels) == ("digits", 297, 8, 1)
    assert spec.num_classes == 10 and spec.class_names == tuple("0123456789")
    unlabelled = open_source("digits", split="test", data_dir=data_dir, use_labels=False)
    assert unlabelled.spec.num_classes == 0 and not unlabelled.read(range(297))["label"].any()


def test_default_directory_is_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert len(load_digits_arrays("test")[0]) == 297
    assert whole(tmp_path / "fdm_jax" / "data") == ["1.0.0"]


def test_unknown_split(data_dir):
    with pytest.raises(UserError, match="digits has no split 'tset': choose one of train, test, "):
        load_digits_arrays("tset", data_dir)


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"digits cannot be prepared in .*file .* writable data_dir"):
        load_digits_arrays("train", tmp_path / "file")


def test_failure_while_preparing_leaves_nothing_and_is_made_good(tmp_path, monkeypatch):
    def fails(self, rows, images, labels):
        yield 0, {"image": images[0], "label": 0}
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(Digits, "_generate_examples", fails)
        with pytest.raises(RuntimeError, match="interrupted"):
            prepare_digits(tmp_path)
    assert whole(tmp_path) == []
    assert len(load_digits_arrays("train", tmp_path)[0]) == 1500


KILLED = """
import os, sys, pathlib
from fdm_jax.data.digits import Digits, prepare_digits
Digits._generate_examples = lambda *_: os._exit(9)
prepare_digits(pathlib.Path(sys.argv[1]))
"""
READS = """
import sys
from fdm_jax.data.digits import load_digits_arrays
images, labels = load_digits_arrays("all", sys.argv[1])
print(len(images), labels.sum(), "tensorflow" in sys.modules)
"""


def test_killed_while_preparing_then_two_at_once(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert killed.returncode == 9 and whole(tmp_path)[0].startswith("incomplete.")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", READS, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    total = sklearn.datasets.load_digits().target.sum()
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out.strip() == f"1797 {total} False", err
    assert whole(tmp_path) == ["1.0.0"]


@pytest.mark.parametrize("name", ["digits-train.array_record-00000-of-00001", "dataset_info.json"])
def test_damaged_files_are_named(tmp_path, name):
    prepare_digits(tmp_path)
    path = tmp_path / "digits" / "1.0.0" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        UserError, match=r"data set in .*1\.0\.0 cannot be read .*: if it is damaged, delete that folder"
    ):
        load_digits_arrays("train", tmp_path)
