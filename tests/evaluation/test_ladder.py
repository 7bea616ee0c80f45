"""Distances grow with what is done to images: noise, blur, classes left out.  Two halves of the real ones are closest."""

import functools

import numpy as np
import pytest
import scipy.ndimage

from fdm_jax.devices import make_mesh
from fdm_jax.evaluation import classifier
from fdm_jax.evaluation.extractors import Extractor, FeatureMaker, open_extractor
from fdm_jax.evaluation.kernel import kernel_distance
from fdm_jax.evaluation.measures import choose_metrics, measure
from fdm_jax.evaluation.moments import moments
from fdm_jax.evaluation.references import Reference

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_draws_whatever_ran_before():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture(scope="module", params=["pixels", pytest.param("classifier", marks=pytest.mark.slow)])
def features_of(request, digits):
    images, labels = digits
    if request.param == "pixels":
        extractor = open_extractor("pixels", None, images.shape[1:])
    else:
        fitted = classifier.fit(images, labels, (images, labels), "digits", steps=200)
        extractor = Extractor("classifier", classifier.WIDTH, None, fitted.params, fitted.apply)
    return FeatureMaker(extractor, make_mesh(), 256), extractor


def noisy(images, amount):
    return np.clip(images + amount * RNG.standard_normal(images.shape), 0, 255).astype(np.uint8)


def blurred(images, amount):
    return scipy.ndimage.gaussian_filter(images.astype(float), (0, amount, amount, 0)).astype(np.uint8)


def test_the_ladder(digits, features_of, monkeypatch):
    few = functools.partial(kernel_distance, subsets=10)  # of subsets that are nearly the whole
    monkeypatch.setattr("fdm_jax.evaluation.measures.kernel_distance", few)
    images, labels = digits
    maker, extractor = features_of
    half = len(images) // 2
    real, ours, classes = maker(images[:half])[0], images[half:], labels[half:]
    reference = Reference(*moments(real), real)
    assert choose_metrics(None, reference, extractor) == ["frechet", "kernel", "precision-recall"]

    def judged(images):
        figures = measure(*maker(images), reference, extractor, ["frechet", "kernel"], bootstrap=0)
        return np.array([figures[name]["value"] for name in ("frechet_distance", "kernel_distance")])

    halves = judged(ours)
    for ladder in (
        [noisy(ours, amount) for amount in (20, 45, 90)],
        [blurred(ours, amount) for amount in (0.5, 0.8, 1.5)],
        [ours[classes < left] for left in (8, 5, 2)],
    ):
        steps = np.array([halves, *(judged(images) for images in ladder)])
        assert (np.diff(steps, axis=0) > 0).all(), steps


def test_every_figure_has_a_deviation(digits, features_of):
    images, _ = digits
    maker, extractor = features_of
    features, logits = maker(images)
    reference = Reference(*moments(features), features)
    figures = measure(features, logits, reference, extractor, ["frechet", "kernel", "precision-recall"], bootstrap=4)
    assert set(figures) == {"frechet_distance", "kernel_distance", "precision", "recall"}  # FID is Inception's alone
    assert figures["precision"]["value"] == figures["recall"]["value"] == 1
    assert all(figure["deviation"] is not None and figure["deviation_of"] for figure in figures.values())
    assert abs(figures["frechet_distance"]["value"]) < 1e-6


def test_shares_have_the_deviation_of_shares():
    reference = Reference(np.zeros(4), np.eye(4), RNG.standard_normal((200, 4)) + 1.5)
    figures = measure(
        RNG.standard_normal((80, 4)), None, reference, open_extractor("pixels", None, (2, 2, 1)), ["precision-recall"]
    )
    for name, n in (("precision", 80), ("recall", 200)):
        share = figures[name]["value"]
        assert 0 < share < 1
        assert figures[name]["deviation"] == pytest.approx(np.std(np.arange(1000) < 1000 * share) / n**0.5, rel=0.01)


def test_the_bootstrap_deviation_is_that_of_new_samples():
    """Sets of 300 from one distribution: their Frechet distances to another spread as the bootstrap of one says."""
    extractor = open_extractor("pixels", None, (2, 2, 1))
    reference = Reference(np.full(4, 3.0), np.eye(4))
    draw = lambda: RNG.standard_normal((300, 4)) * 2  # noqa: E731
    once = lambda x, b: measure(x, None, reference, extractor, ["frechet"], bootstrap=b)["frechet_distance"]  # noqa: E731
    spread = np.std([once(draw(), 0)["value"] for _ in range(100)])
    assert once(draw(), 100)["deviation"] == pytest.approx(spread, rel=0.4)


def test_the_inception_score_and_its_name():
    features, logits = RNG.standard_normal((500, 8)), np.eye(10)[np.arange(500) % 10] * 50
    extractor = Extractor("inception", 8, "00", {}, lambda v, x: (x, x))
    reference = Reference(*moments(features), features)
    figures = measure(features, logits, reference, extractor, choose_metrics(None, reference, extractor), bootstrap=2)
    assert set(figures) == {"fid", "kid", "precision", "recall", "inception_score"}
    # Of ten parts of 50 images, in which ten classes are not quite even: exp(ln 10 - 9 / 100).
    assert figures["inception_score"]["value"] == pytest.approx(9.1, abs=0.4)


def test_metrics_that_there_is_no_material_for():
    from fdm_jax.errors import UserError

    pixels = open_extractor("pixels", None, (2, 2, 1))
    reference = Reference(np.zeros(4), np.eye(4))
    assert choose_metrics(None, reference, pixels) == ["frechet"]
    for name, words in [
        ("kernel", "--keep-features"),
        ("precision-recall", "--keep-features"),
        ("inception-score", "needs the extractor inception"),
        ("fid", "There is no metric 'fid'"),
    ]:
        with pytest.raises(UserError, match=words):
            choose_metrics([name], reference, pixels)
