"""Sets that TFDS prepared, by itself or for us, as they are read."""

import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from fdm_jax.data import statistics
from fdm_jax.data.digits import prepare_digits
from fdm_jax.data.opening import open_source
from fdm_jax.errors import UserError


def foreign(folder, pixels="uint8", is_class=True, label=1):
    """The folder of a set of one image that TFDS alone prepared."""

    class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = {"label": tfds.features.ClassLabel(num_classes=3) if is_class else tfds.features.Scalar(np.int64)}
            kinds["image"] = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.dtype(pixels))
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(kinds))

        def _split_generators(self, dl_manager):
            return {"train": iter([(0, {"image": np.full((2, 2, 1), 300).astype(pixels), "label": label})])}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Foreign(data_dir=str(folder / "data"), file_format="array_record")
    builder.download_and_prepare(download_dir=str(folder))
    return builder.data_dir


@pytest.mark.parametrize("pixels, is_class", [("float32", True), ("uint16", True), ("uint8", False), ("uint8", True)])
def test_data_sets_that_others_made_with_tfds(tmp_path, pixels, is_class):
    folder = foreign(tmp_path, pixels, is_class)
    if (pixels, is_class) == ("uint8", True):
        assert open_source(str(folder)).read([0])["image"].tolist() == [[[[44], [44]]] * 2]
        return
    with pytest.raises(UserError, match=f"has images of {pixels}, or labels that are no classes"):
        open_source(str(folder))


def test_the_newest_whole_version_is_read(tmp_path):
    """By number, not by letters; what a killed preparation left has no description yet."""
    folder = tmp_path / "sets" / "foreign"
    for version, label in (("1.9.0", 1), ("1.10.0", 2)):
        shutil.copytree(foreign(tmp_path / version, label=label), folder / version)
    (folder / "2.0.0").mkdir()
    for name, data_dir in ((folder, None), ("foreign", folder.parent)):
        assert open_source(str(name), data_dir=data_dir).read([0])["label"].tolist() == [2]


def test_files_that_only_tensorflow_reads(tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(foreign(tmp_path), folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="foreign holds tfrecord files, which only TensorFlow reads: prepare"):
        open_source(str(folder))


def test_a_label_that_is_no_class(tmp_path):
    """TFDS writes -1 where a class is not known."""
    folder = str(foreign(tmp_path, label=-1))
    source = open_source(folder)
    with pytest.raises(
        UserError,
        match="example 0 of foreign has the label -1, but with 3 classes.* from 0 to 2: .*class_conditional=False",
    ):
        source.read([0])
    with pytest.raises(UserError, match="label -1"):
        statistics.measure(open_source(folder))
    source = open_source(folder, use_labels=False)
    assert source.read([0])["label"].tolist() == [0] and source.spec.num_classes == 0


def test_labels_that_are_not_read_may_be_anything(tmp_path):
    source = open_source(str(foreign(tmp_path, is_class=False)), use_labels=False)
    assert source.read([0])["label"].tolist() == [0] and source.spec.class_names is None


def test_names_that_are_not_those_of_the_classes(tmp_path):
    """Each label beyond them would be trained as no class at all."""
    folder = tmp_path / "digits"
    shutil.copytree(prepare_digits(tmp_path / "data"), folder)
    names = folder / "label.labels.txt"
    assert names.read_text().split() == list("0123456789")
    names.write_text("0\n1\n2\n")
    with pytest.raises(UserError, match=r"digits cannot be read \(it has 3 names for 10 classes\): if it is damaged, "):
        open_source(str(folder))
    assert open_source(str(folder), use_labels=False).spec.num_classes == 0
