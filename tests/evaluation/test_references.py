"""Statistics files, extractors and the classifier: what goes in comes out, and what is wrong is said."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from fdm_jax.devices import make_mesh
from fdm_jax.errors import UserError
from fdm_jax.evaluation import classifier
from fdm_jax.evaluation.extractors import FeatureMaker, open_extractor
from fdm_jax.evaluation.references import Reference, check_fits, load_reference, save_reference

RNG = np.random.default_rng(0)
SHAPE = (8, 8, 1)


def test_statistics_come_back(tmp_path):
    features = RNG.standard_normal((5, 3)).astype(np.float32)
    reference = Reference(np.arange(3.0), np.eye(3), features, {"extractor": "pixels", "images": 5})
    save_reference(reference, tmp_path / "new" / "stats.npz")
    back = load_reference(tmp_path / "new" / "stats.npz")
    for name in ("mu", "sigma", "features"):
        np.testing.assert_array_equal(getattr(back, name), getattr(reference, name))
    assert back.description == reference.description and len(back.checksum) == 64
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["stats.npz"]


def test_the_classifier_multiplies_with_all_digits():
    """By default accelerators do not (TF32, bfloat16), and distances would depend on the device."""
    params = jax.eval_shape(classifier.Network(3).init, jax.random.key(0), np.zeros((1, *SHAPE)))["params"]
    fitted = classifier.Classifier(3, SHAPE, "x", 1.0, None)
    program = str(jax.make_jaxpr(fitted.apply)(params, np.zeros((1, *SHAPE), np.uint8)))
    products = program.count("dot_general[") + program.count("conv_general_dilated[")
    assert products == 4 and program.count("Precision.HIGHEST") == 2 * products  # one for either factor


def test_the_authors_files_are_read(tmp_path):
    np.savez(tmp_path / "cifar10-32x32.npz", mu=np.zeros(4), sigma=np.eye(4))
    back = load_reference(tmp_path / "cifar10-32x32.npz")
    assert back.features is None and back.description == {}


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"mu": np.zeros(3)}, "have no sigma"),
        ({"sigma": np.eye(3)}, "have no mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"covariance of .* is \[4, 4\], and its mean has 3"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "sigma of .* must be finite"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "mu of .* must be finite numbers in 1 dimension"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "description": np.array("{")}, "description in .* is damaged"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "description": np.array("[1]")}, "description in .* is damaged"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros(9)}, r"numbers \[N, 3\], .* are float64 \[9\]"),
    ],
)
def test_statistics_that_are_none(tmp_path, arrays, words):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(UserError, match=words):
        load_reference(tmp_path / "stats.npz")


def test_files_that_are_something_else(tmp_path):
    np.savez(tmp_path / "cut.npz", mu=np.zeros(300), sigma=np.eye(300))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:5000])
    (tmp_path / "text.npz").write_text("mu, sigma")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez_compressed(tmp_path / "damaged.npz", mu=np.zeros(300), sigma=np.arange(90000.0).reshape(300, 300))
    with (tmp_path / "damaged.npz").open("r+b") as file:
        file.seek(400)
        file.write(b"\xff" * 400)
    for name in ("cut.npz", "text.npz", "one.npy", "damaged.npz"):
        with pytest.raises(UserError, match="is no file of statistics"):
            load_reference(tmp_path / name)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_reference(tmp_path / "nowhere.npz")


def test_statistics_and_extractor_have_to_fit():
    pixels = open_extractor("pixels", None, SHAPE)
    check_fits(Reference(np.zeros(64), np.eye(64)), pixels, "stats")
    with pytest.raises(UserError, match="are of 2048 numbers an image, and the extractor pixels gives 64"):
        check_fits(Reference(np.zeros(2048), np.zeros((2048, 2048))), pixels, "stats")
    with pytest.raises(UserError, match="made with the extractor classifier, and this is pixels"):
        check_fits(Reference(np.zeros(64), np.eye(64), description={"extractor": "classifier"}), pixels, "stats")


def test_pixels_in_any_batch():
    images = RNG.integers(0, 256, (11, *SHAPE), np.uint8)
    for size in (1, 8, 64):
        features, logits = FeatureMaker(open_extractor("pixels", None, SHAPE), make_mesh(), size)(images)
        np.testing.assert_allclose(features, images.reshape(11, -1) / 255, rtol=1e-6)
        assert logits is None


@pytest.fixture(scope="module")
def halves():
    """Images bright above, and bright below."""
    labels = RNG.integers(0, 2, 400)
    images = RNG.integers(0, 100, (400, *SHAPE)).astype(np.uint8)
    images[labels == 0, :4] += 60
    images[labels == 1, 4:] += 60
    return images, labels


@pytest.fixture(scope="module")
def fitted(halves):
    images, labels = halves
    return classifier.fit(images[:300], labels[:300], (images[300:], labels[300:]), "halves", steps=60, batch_size=32)


def test_a_classifier_learns_and_its_features_have_a_scale_of_one(halves, fitted, tmp_path):
    assert fitted.accuracy > 0.95 and fitted.classes == 2
    classifier.save(fitted, tmp_path / "c.safetensors")
    back = classifier.load(tmp_path / "c.safetensors")
    assert dataclasses.replace(back, params=None) == dataclasses.replace(fitted, params=None)
    jax.tree.map(np.testing.assert_array_equal, back.params, fitted.params)
    images = RNG.integers(0, 256, (200, *SHAPE), np.uint8)
    maker = FeatureMaker(open_extractor("classifier", tmp_path / "c.safetensors", SHAPE), make_mesh(), 64)
    features, logits = maker(images)
    assert features.shape == (200, classifier.WIDTH) and logits.shape == (200, 2)
    np.testing.assert_allclose(features, fitted.apply(fitted.params, images)[0], atol=1e-4)
    spread = np.std(fitted.apply(fitted.params, halves[0][:300])[0], axis=0)  # of what it learned from
    np.testing.assert_allclose(spread[spread > 0], 1, atol=1e-3)
    assert np.sum(spread > 0) > classifier.WIDTH / 2


def test_files_of_one_classifier_are_equal(fitted, tmp_path):
    """Their checksum stands for it, in references and evaluations."""
    files = [tmp_path / f"{i}.safetensors" for i in range(10)]
    for file in files:
        classifier.save(fitted, file)
    assert len({file.read_bytes() for file in files}) == 1


def test_a_classifier_of_an_early_version(fitted, tmp_path):
    """Its format stood beside the rest."""
    classifier.save(fitted, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "numpy") as file:
        rest = json.loads(file.metadata()["classifier"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for form in (rest.pop("format"), "fdm_jax classifier 0"):
        metadata = {"format": form, "classifier": json.dumps(rest)}
        safetensors.numpy.save_file(arrays, tmp_path / f"{form}.safetensors", metadata)
    assert classifier.load(tmp_path / f"{classifier.FORMAT}.safetensors").accuracy == fitted.accuracy
    with pytest.raises(UserError, match="is no classifier"):
        classifier.load(tmp_path / "fdm_jax classifier 0.safetensors")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"more": 1}, "unexpected keyword argument 'more'"),
        ({"classes": 0}, r"images of \(8, 8, 1\), 0 classes"),
        ({"classes": None}, "None classes"),
        ({"image_shape": [8, 8]}, r"images of \(8, 8\), 2 classes"),
        ({"image_shape": [8, 8, 1, 1]}, r"images of \(8, 8, 1, 1\)"),  # a network that never gets to 4x4
        ({"image_shape": [8, 0, 1]}, r"images of \(8, 0, 1\)"),
        ({"image_shape": ["8", 8, 1]}, "images of "),
        ({"image_shape": 8}, "not iterable"),
        ({"image_shape": [16, 8, 1]}, r"arrays are not those of a classifier of \(16, 8, 1\)"),
        (None, "no attribute"),
    ],
)
def test_a_classifier_whose_description_is_damaged(fitted, tmp_path, change, words):
    classifier.save(fitted, tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "numpy") as file:
        rest = json.loads(file.metadata()["classifier"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = json.dumps(change and rest | change)
    safetensors.numpy.save_file(arrays, tmp_path / "c.safetensors", {"classifier": content})
    with pytest.raises(UserError, match=f"damaged.*{words}"):
        classifier.load(tmp_path / "c.safetensors")


def test_a_classifier_that_cannot_be_written(fitted, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc")):  # where there is no such place, and where nobody may write
        with pytest.raises(UserError, match="c.safetensors cannot be written"):
            classifier.save(fitted, folder / "c.safetensors")


def test_extractors_that_cannot_be_opened(fitted, tmp_path):
    classifier.save(fitted, tmp_path / "c.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:400])
    for arguments, words in [
        (("incepton", None, SHAPE), "did you mean 'inception'"),
        (("classifier", None, SHAPE), "needs its weights"),
        (("pixels", tmp_path / "c.safetensors", SHAPE), "has no weights"),
        (("pixels", None, (64, 64, 3)), "up to 3,072 values, and these have 12,288"),
        (("classifier", tmp_path / "nowhere", SHAPE), "nowhere are not there"),
        (("classifier", tmp_path / "c.safetensors", (9, 9, 1)), "reads images of 8x8x1, and these are 9x9x1"),
        (("classifier", tmp_path / "broken.safetensors", SHAPE), r"sha256 [0-9a-f]{64}\) is no classifier"),
    ]:
        with pytest.raises(UserError, match=words):
            open_extractor(*arguments)
    for images in (4, 0):
        with pytest.raises(UserError, match="two classes or more"):
            classifier.fit(np.zeros((images, *SHAPE), np.uint8), np.zeros(images, int), (None, None), "one")
