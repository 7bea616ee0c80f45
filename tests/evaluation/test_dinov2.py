"""DINOv2: features of Hugging Face's network on random weights, Pillow's resizing, files of weights."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from golden.make_extractors import DINOV2_INPUTS, TINY, images, numbers
from safetensors.numpy import save_file

from fdm_jax.errors import UserError
from fdm_jax.evaluation.dinov2 import DinoV2Config, dinov2_features, interpolation, load_dinov2, resize_bicubic

WIDTH, DEPTH, PATCH = TINY["hidden_size"], TINY["num_hidden_layers"], TINY["patch_size"]
GATED = 344  # of 512 two thirds, rounded up to a multiple of 8
features = jax.jit(dinov2_features, static_argnums=0)


def shapes(gated=False):
    """Hugging Face's names and shapes for the tiny network of the golden numbers."""
    found = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.mask_token": (1, WIDTH),
        "embeddings.position_embeddings": (1, 37 * 37 + 1, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    }
    dense = {f"attention.attention.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")}
    dense["attention.output.dense"] = (WIDTH, WIDTH)
    if gated:
        dense |= {"mlp.weights_in": (2 * GATED, WIDTH), "mlp.weights_out": (WIDTH, GATED)}
    else:
        dense |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
    for layer in (f"encoder.layer.{index}" for index in range(DEPTH)):
        found |= {f"{layer}.{name}.weight": shape for name, shape in dense.items()}
        found |= {f"{layer}.{name}.bias": shape[:1] for name, shape in dense.items()}
        found |= {f"{layer}.norm{i}.{name}": (WIDTH,) for i in (1, 2) for name in ("weight", "bias")}
        found |= {f"{layer}.layer_scale{i}.lambda1": (WIDTH,) for i in (1, 2)}
    return found | {"layernorm.weight": (WIDTH,), "layernorm.bias": (WIDTH,)}


@pytest.fixture
def write(tmp_path):
    """write(changes, gated) -> a file of random weights; a change to None leaves a tensor out."""

    def write(changes=None, gated=False):
        state = {name: numbers(name, shape) for name, shape in shapes(gated).items()} | (changes or {})
        save_file({name: value for name, value in state.items() if value is not None}, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"

    return write


def refused(path):
    with pytest.raises(UserError) as error:
        load_dinov2(path)
    sentence = str(error.value)
    assert sentence.endswith(".") and not sentence.endswith("..")
    if path.is_file():
        assert hashlib.sha256(path.read_bytes()).hexdigest() in sentence
    return sentence


@pytest.mark.parametrize("key", DINOV2_INPUTS)
@pytest.mark.parametrize("network", ["original", "transformers", "swiglu"])
def test_golden_features(golden, write, network, key):
    gated = network == "swiglu"
    config, variables = load_dinov2(write(gated=gated))
    assert config == DinoV2Config(WIDTH, DEPTH, GATED if gated else 4 * WIDTH, PATCH, 37, gated)
    if network != "original":
        config = dataclasses.replace(config, offset=0.0)
    found = features(config, variables, images(*DINOV2_INPUTS[key]))
    np.testing.assert_allclose(found, golden("dinov2")[f"{network}/{key}"], rtol=0, atol=2e-5)  # they are about 1


def test_images_of_another_kind_are_refused():
    with pytest.raises(UserError, match="Images must be"):
        dinov2_features(DinoV2Config(64, 1, 64, 14, 37, False), {}, np.zeros((1, 8, 8, 2), np.uint8))


@pytest.mark.parametrize("height, width", [(32, 32), (64, 64), (28, 40), (256, 300), (224, 100), (500, 1000), (1, 5)])
def test_resize_is_pillows(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    expected = PIL.Image.fromarray(image).resize((224, 224), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize_bicubic(jnp.asarray(image, jnp.float32)[None], 224)[0], np.asarray(expected))


def test_interpolation_in_closed_form():
    np.testing.assert_array_equal(interpolation(9, 9, 0), np.eye(9))
    matrix = interpolation(37, 16, 0)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=1e-6)
    # Half-way between two values: the cubic of parameter -3/4.
    np.testing.assert_allclose(interpolation(36, 18, 0)[5, 9:13], [-0.09375, 0.59375, 0.59375, -0.09375], rtol=1e-6)


def test_other_patches_and_positions(write):
    """Positions for 224 pixels are taken as they are."""
    name = "embeddings.position_embeddings"
    positions = numbers(name, (1, 257, WIDTH))
    config, variables = load_dinov2(write({name: positions}))
    assert config.grid == 16
    pixels = images(3, 32, 32)
    other = dataclasses.replace(config, offset=0.0)
    np.testing.assert_array_equal(features(config, variables, pixels), features(other, variables, pixels))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"layernorm.bias": None}, "the tensor layernorm.bias is missing"),
        ({"embeddings.position_embeddings": None}, "the tensor embeddings.position_embeddings is missing"),
        ({"encoder.layer.0.mlp.fc1.weight": None}, "the tensor encoder.layer.0.mlp.fc1.weight is missing"),
        ({"layernorm.bias": np.zeros(3, np.float32)}, "layernorm.bias has shape [3], where [128] is right"),
        ({"embeddings.position_embeddings": np.zeros((1, 1300, WIDTH), np.float32)}, "where [1, 1297, 128] is right"),
        ({"embeddings.position_embeddings": np.zeros((1, 0, WIDTH), np.float32)}, "it has no positions"),
        ({"layernorm.bias": np.zeros(WIDTH, np.float16)}, "of type float16, where float32 is right"),
        ({"classifier.bias": np.zeros(9, np.float32)}, "no place for the tensor classifier.bias"),
        ({"encoder.layer.9.norm1.bias": np.zeros(WIDTH, np.float32)}, "the tensor encoder.layer.2"),
        ({"embeddings.register_tokens": np.zeros((1, 4, WIDTH), np.float32)}, "it has registers"),
        (
            {"embeddings.patch_embeddings.projection.weight": np.zeros((100, 3, 14, 14), np.float32)},
            "its tokens are 100 wide, which is no multiple of 64",
        ),
        (
            {"embeddings.patch_embeddings.projection.weight": np.zeros((WIDTH, 3, 15, 15), np.float32)},
            "its patches of 15 pixels do not fill an image of 224",
        ),
        (
            {"embeddings.patch_embeddings.projection.weight": np.zeros((WIDTH, 14), np.float32)},
            "projection.weight has shape [128, 14], where 4 dimensions are right",
        ),
    ],
)
def test_files_of_other_networks(write, changes, sentence):
    path = write(changes)
    said = refused(path)
    assert said.startswith(f"{path} is not a DINOv2 without registers in Hugging Face's names: ")
    assert sentence in said


def test_files_that_are_damaged_or_none(write, tmp_path):
    path = write()
    path.write_bytes(path.read_bytes()[:-100])
    assert "is damaged or incomplete" in refused(path)
    path.write_bytes(b"something else")
    assert "is damaged or incomplete" in refused(path)
    assert "There is no file" in refused(tmp_path / "none.safetensors")
    assert "ends in .safetensors" in refused(tmp_path / "model.pth")
