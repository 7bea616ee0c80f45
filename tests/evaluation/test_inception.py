"""Inception-v3 of the FID: features of pytorch-fid's network on random weights, TensorFlow's resizing, files of weights."""

import hashlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_extractors import INCEPTION_INPUTS, images, numbers
from safetensors.numpy import load_file, save_file

from fdm_jax.errors import UserError
from fdm_jax.evaluation import inception
from fdm_jax.evaluation.inception import convert_inception, inception_features, load_inception
from fdm_jax.evaluation.weights import check_weights

features = jax.jit(inception_features)


@pytest.fixture(scope="module")
def state():
    """Random weights under pytorch-fid's names: a parameter's numbers depend on its name."""
    return {name: numbers(name, shape) for name, shape in inception._shapes().items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(state, path)
    yield path
    path.unlink()  # 95 MB


@pytest.fixture
def pth(monkeypatch, tmp_path, state):
    """A file that a stand-in for torch reads as pytorch-fid's."""
    path = tmp_path / inception.PTH
    path.write_bytes(b"as torch would write it")
    content = {**state, "Conv2d_1a_3x3.bn.num_batches_tracked": np.int64(0)}

    def load(file, map_location, weights_only):
        assert (file, map_location, weights_only) == (path, "cpu", True)
        return {name: types.SimpleNamespace(numpy=lambda value=value: value) for name, value in content.items()}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    return path


def refused(path, load=load_inception):
    with pytest.raises(UserError) as error:
        load(path)
    sentence = str(error.value)
    assert sentence.endswith(".") and not sentence.endswith("..")
    if path.is_file() and path.suffix == ".safetensors":
        assert hashlib.sha256(path.read_bytes()).hexdigest() in sentence
    return sentence


@pytest.mark.parametrize("key", INCEPTION_INPUTS)
def test_golden_features(golden, file, key):
    found = features(load_inception(file), images(*INCEPTION_INPUTS[key]))
    for name, value in zip(("features", "logits"), found, strict=True):
        expected = golden("inception")[f"{key}/{name}"]
        # Their mean is 3 (0.1 for logits), and up to 2 (1) lie between the images.
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-4)


def test_float_images_are_as_uint8():
    variables = {"params": {}}
    seen = []
    network = types.SimpleNamespace(apply=lambda _, x: seen.append(np.asarray(x)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "Inception", lambda: network)
        pixels = images(1, 8, 8)
        inception_features(variables, pixels)
        inception_features(variables, pixels.astype(np.float32))
    np.testing.assert_array_equal(seen[0], seen[1])
    assert seen[0].shape == (2, 299, 299, 3) and seen[0][0, 0, 0, 1] == (pixels[0, 0, 0, 0] - 128.0) / 128


@pytest.mark.parametrize(
    "bad", [np.zeros((8, 8, 3), np.uint8), np.zeros((1, 8, 8, 4), np.uint8), np.zeros((1, 8, 8, 3), np.int32)]
)
def test_images_of_another_kind_are_refused(bad):
    with pytest.raises(UserError, match="Images must be"):
        inception_features({}, bad)


@pytest.mark.parametrize("height, width", [(32, 32), (7, 1), (299, 64), (300, 1000)])
def test_resize_follows_the_formula(height, width):
    image = np.random.default_rng(0).uniform(0, 255, (height, width)).astype(np.float32)
    expected = np.empty((299, 299))
    for i in range(299):
        for j in range(299):
            # Positions are float32 in TensorFlow.
            y, x = (float(np.float32(k) * (np.float32(n) / np.float32(299))) for k, n in ((i, height), (j, width)))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            expected[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    found = inception.resize_bilinear(jnp.asarray(image)[None, :, :, None], 299)[0, :, :, 0]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_resize_in_closed_form():
    image = jnp.asarray(images(3, 299, 299), jnp.float32)
    np.testing.assert_array_equal(inception.resize_bilinear(image, 299), image)
    ramp = jnp.broadcast_to(jnp.arange(32.0)[None, :, None, None], (1, 32, 32, 1))
    found = inception.resize_bilinear(ramp, 299)[0, :, :, 0]
    expected = np.minimum(np.arange(299) * 32 / 299, 31)  # repeats the last row, and only that
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None], (299, 299)), atol=1e-5)


def test_pth_is_converted_once_and_for_all(pth, state, file, tmp_path, monkeypatch):
    out = tmp_path / "weights.safetensors"
    convert_inception(pth, out)
    converted = load_file(out)
    assert converted.keys() == state.keys()
    assert all(np.array_equal(converted[name], state[name]) for name in state)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([pth.name, out.name])
    direct = load_inception(pth)
    monkeypatch.setitem(sys.modules, "torch", None)
    jax.tree.map(np.testing.assert_array_equal, load_inception(out), direct)
    jax.tree.map(np.testing.assert_array_equal, load_inception(file), direct)
    with pytest.raises(UserError, match="is there already"):
        convert_inception(pth, out)
    out.unlink()


def test_conversion_that_cannot_be_written(pth, tmp_path):
    with pytest.raises(UserError, match="must end in .safetensors"):
        convert_inception(pth, tmp_path / "weights.npz")
    with pytest.raises(UserError, match="weights.safetensors cannot be written"):
        convert_inception(pth, pth / "weights.safetensors")


def test_conversions_of_one_file_are_one(pth, tmp_path, monkeypatch):
    """Statistics that were made with one of them are refused with weights of another checksum."""
    monkeypatch.setattr(inception, "_read", lambda path: {"fc.bias": np.zeros(2, np.float32)})
    checksums = set()
    for i in range(20):  # the order of several entries would be chance
        out = tmp_path / f"{i}.safetensors"
        convert_inception(pth, out)
        checksums.add(hashlib.sha256(out.read_bytes()).hexdigest())
        out.unlink()
    assert len(checksums) == 1


def test_pth_without_torch(tmp_path, monkeypatch):
    path = tmp_path / inception.PTH
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refused(path).startswith("To read Inception's weights from a .pth file, torch must be installed")


def test_reason_of_torch_is_one_plain_sentence(tmp_path, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("Weights only load failed. Do as follows:\n\x1b[1mtrust the file")

    path = tmp_path / "other.pth"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    assert "(RuntimeError: Weights only load failed; its sha256 is " in refused(path)


@pytest.mark.parametrize("content", [[1, 2], {3: 4}, {"epoch": 5}])
def test_pth_of_something_else(tmp_path, monkeypatch, content):
    path = tmp_path / "other.pth"
    path.write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=lambda *_, **__: content))
    assert hashlib.sha256(b"anything").hexdigest() in refused(path)


def test_file_of_another_network(tmp_path, state):
    path = tmp_path / "other.safetensors"
    first, second, *_ = inception._shapes()
    save_file({"classifier.weight": state[first]}, path)
    assert f"is not the Inception-v3 of the Frechet Inception Distance: the tensor {first} is missing" in refused(path)
    save_file({first: state[first]}, path)
    assert f"the tensor {second} is missing" in refused(path)
    save_file({first: state[first][:, :1]}, path)
    shape = list(state[first].shape)
    assert f"the tensor {first} has shape {[shape[0], 1, *shape[2:]]}, where {shape} is right" in refused(path)


def test_surplus_tensor(state, tmp_path):
    path = tmp_path / "surplus.safetensors"
    save_file({**state, "AuxLogits.fc.weight": np.zeros(3, np.float32)}, path)
    assert "the network has no place for the tensor AuxLogits.fc.weight" in refused(path)
    path.unlink()


def test_damaged_files(file, tmp_path):
    path = tmp_path / "cut.safetensors"
    with file.open("rb") as whole:
        path.write_bytes(whole.read(200_000))
    assert "is damaged or incomplete, or not the Inception-v3" in refused(path)
    for content in (b"", b"PK\x03\x04 no such format", b"\xff" * 100):
        path.write_bytes(content)
        assert "is damaged or incomplete, or not the Inception-v3" in refused(path)


def test_files_that_are_none(tmp_path):
    assert "There is no file" in refused(tmp_path / "none.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert "cannot be read" in refused(tmp_path / "folder.safetensors")
    assert "ends in .safetensors or .pth" in refused(tmp_path / "inception.pkl")


def test_numbers_that_are_wrong():
    with pytest.raises(UserError, match="of type float16, where float32 is right"):
        check_weights({"w": np.zeros(2, np.float16)}, {"w": (2,)})
    with pytest.raises(UserError, match="not finite"):
        check_weights({"w": np.array([1, np.nan], np.float32)}, {"w": (2,)})
