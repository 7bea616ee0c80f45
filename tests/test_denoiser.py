"""Families around whole networks, against the original: D, sampler outputs, losses and their gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import nhwc

from fdm_jax.denoiser import make_denoise_fn
from fdm_jax.errors import UserError
from fdm_jax.families import EDM, VE, VP
from fdm_jax.interop.state_dict import from_torch
from fdm_jax.momentum import Momentum
from fdm_jax.networks import SongUNet
from fdm_jax.objective import denoising_loss, loss_weight
from fdm_jax.sampling import edm_sample, edm_sigmas, sampling_range

CASES = {
    "fdm_edm": (EDM(momentum=Momentum(multiplier=2.0)), SongUNet(8, 1, 10, 9, "ddpmpp", 16, (1, 2), num_blocks=1)),
    "ve": (VE(), SongUNet(8, 1, 0, 9, "ncsnpp", 16, (1, 2), num_blocks=1)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    """(name, family, variables, apply(variables, x, sigma, labels, augment_labels) -> D), compiled once."""
    family, network = CASES[request.param]

    @jax.jit
    def apply(variables, x, sigma, labels, augment_labels):
        return make_denoise_fn(family, functools.partial(network.apply, variables))(x, sigma, labels, augment_labels)

    return request.param, family, jax.tree.map(jnp.asarray, from_torch(golden(f"weights_{request.param}"))), apply


def test_golden_denoiser(case, golden):
    name, _, variables, apply = case
    data = golden(f"snapshot_{name}")
    labels = data["D/class_labels"] if name == "fdm_edm" else np.zeros((4, 0), np.float32)
    zeros = np.zeros_like(data["D/augment_labels"])
    for sigma, x, out, out_aug in zip(data["D/sigma"], data["D/x"], data["D/out"], data["D/out_aug"], strict=True):
        for augment_labels, expected in ((zeros, out), (data["D/augment_labels"], out_aug)):
            D_x = apply(variables, nhwc(x), np.full(4, sigma, np.float32), labels, augment_labels)
            scale = np.abs(expected).max()
            np.testing.assert_allclose(D_x, nhwc(expected), atol=1e-4 * scale, err_msg=f"sigma {sigma}")
    D_x = apply(variables, nhwc(data["D/x_unit"]), data["D/sigma_vec"], labels, zeros)
    np.testing.assert_allclose(D_x, nhwc(data["D/out_sigma_vec"]), atol=1e-4 * np.abs(D_x).max())


def test_golden_samples(case, golden):
    """Rounding of the latents alone moves the original's samples by the stored sensitivity."""
    name, family, variables, apply = case
    data = golden(f"snapshot_{name}")
    labels = data["D/class_labels"] if name == "fdm_edm" else np.zeros((4, 0), np.float32)
    zeros = np.zeros_like(data["D/augment_labels"])
    denoise = lambda x, sigma: apply(variables, x, jnp.full(4, sigma), labels, zeros)  # noqa: E731
    latents = jnp.asarray(nhwc(data["S/latents"]), jnp.float32)
    out = jax.jit(lambda x: edm_sample(denoise, x, edm_sigmas(18, *sampling_range(family))))(latents)
    sensitivity = float(data["S/edm18/maxdiff_when_latents_perturbed_1e-6"])
    np.testing.assert_allclose(out, nhwc(data["S/edm18/out"]), atol=max(20 * sensitivity, 1e-4))


@pytest.mark.parametrize("warmup", ["none", "w400"])
def test_golden_whole_loss_and_gradients(case, golden, warmup):
    name, family, variables, apply = case
    data = {
        key.removeprefix(f"full/{name}/"): v for key, v in golden("loss").items() if key.startswith(f"full/{name}/")
    }
    images, noise, labels = nhwc(data["images"]), nhwc(data["noise"]), data["labels"]
    draw = data["randn" if name == "fdm_edm" else "rand"].ravel()
    constants = {k: v for k, v in variables.items() if k != "params"}

    sigma = family.training_sigma(jnp.asarray(draw))
    weight = loss_weight(family, sigma, 0, 400 if warmup == "w400" else 0)

    def objective(params):
        denoise = lambda x, sigma: apply({"params": params, **constants}, x, sigma, labels, jnp.zeros((6, 9)))  # noqa: E731
        loss = denoising_loss(denoise, images, sigma, noise, weight)
        return loss.sum() / len(images), loss

    gradients, loss = jax.jit(jax.grad(objective, has_aux=True))(variables["params"])
    np.testing.assert_allclose(loss, data[f"loss_{warmup}"].sum(axis=(1, 2, 3)), rtol=2e-5)
    assert float(loss.sum()) == pytest.approx(float(data[f"loss_sum_{warmup}"]), rel=1e-5)
    # Put the gradients' norms under the original's names by sending the names through the loader.
    shapes = {key: value.shape for key, value in golden(f"weights_{name}").items()}
    largest, compared = np.nanmax(data[f"grad_norms_{warmup}"]), 0
    for parameter, norm in zip(data["param_names"], data[f"grad_norms_{warmup}"], strict=True):
        ((path, _),) = jax.tree_util.tree_leaves_with_path(
            from_torch({str(parameter): np.zeros(shapes[full(str(parameter), shapes)])})["params"]
        )
        ours = gradients
        for key in path:
            ours = ours[key.key]
        if np.isnan(norm):  # got no gradient there: augment labels were absent
            assert float(jnp.abs(ours).max()) == 0
            continue
        assert float(jnp.linalg.norm(ours)) == pytest.approx(norm, rel=2e-4, abs=1e-4 * largest)
        compared += 1
    assert compared > 100
    for key in (k for k in data if k.startswith("grad_") and k.endswith(f"_{warmup}") and "norms" not in k):
        stored = data[key]
        ours = {
            "map_layer0": gradients["map_layer0"]["kernel"].T,
            "conv_in": gradients["enc_8x8_conv"]["kernel"].transpose(3, 2, 0, 1),
            "aux_conv": gradients["dec_8x8_aux_conv"]["kernel"].transpose(3, 2, 0, 1),
        }[key.split("_", 1)[1].split(".")[0]]
        np.testing.assert_allclose(ours, stored, atol=2e-5 * np.abs(stored).max() + 1e-6, rtol=1e-3)


def full(name, shapes):
    """The name as it stands in the weights file."""
    return name if name in shapes else f"model.{name}"


def test_denoiser_at_zero_noise_is_the_identity(case):
    _, _, variables, apply = case
    x = jnp.ones((4, 8, 8, 1))
    width = 10 if "map_label" in variables["params"] else 0
    np.testing.assert_array_equal(apply(variables, x, jnp.zeros(4), jnp.zeros((4, width)), jnp.zeros((4, 9))), x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_coefficients_are_those_of_float32_whatever_is_given(dtype):
    """An integer sigma would be 0 here, and VP's c_noise has 8 bits as a bfloat16."""
    denoise = make_denoise_fn(VP(momentum=Momentum()), lambda x, c_noise: x + c_noise[:, None, None, None])
    x = jnp.ones((2, 2, 2, 1))
    for sigma in (0.7, 70.3):
        np.testing.assert_array_equal(denoise(x.astype(dtype), sigma), denoise(x, sigma))


def test_points_are_denoised_as_images_of_one_pixel_are():
    points, sigma = jnp.asarray([[1.0, -2.0], [0.5, 0.0], [3.0, 4.0]]), jnp.asarray([0.1, 1.0, 9.0])
    noise, weight = points[::-1], jnp.asarray([1.0, 2.0, 3.0])
    denoise = make_denoise_fn(CASES["fdm_edm"][0], lambda x, c_noise: jnp.sin(x))
    as_images = [a[:, None, None, :] for a in (points, noise)]
    np.testing.assert_allclose(denoise(points, sigma), denoise(as_images[0], sigma)[:, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(
        denoising_loss(denoise, points, sigma, noise, weight),
        denoising_loss(denoise, as_images[0], sigma, as_images[1], weight), rtol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(3,), (2, 1, 1, 1)])
def test_noise_levels_of_another_shape_are_refused(shape):
    denoise = make_denoise_fn(EDM(), lambda x, c_noise: x)
    with pytest.raises(UserError, match="one for each of the 2 images, .* and is " + re.escape(str(list(shape)))):
        denoise(jnp.zeros((2, 4, 4, 1)), jnp.ones(shape))


def test_a_network_that_gives_another_shape_is_refused():
    """Its result would be broadcast."""
    with pytest.raises(UserError, match=r"gives \[2, 4, 4, 3\] for images of \[2, 4, 4, 1\]"):
        make_denoise_fn(EDM(), lambda x, c_noise: jnp.repeat(x, 3, axis=-1))(jnp.ones((2, 4, 4, 1)), 1.0)
