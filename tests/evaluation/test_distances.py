"""Moments, kernel distance, precision and recall, Inception score: against plain loops and other libraries."""

import numpy as np
import pytest
import scipy.stats
from sklearn.neighbors import NearestNeighbors

from fdm_jax.errors import UserError
from fdm_jax.evaluation.coverage import precision_recall
from fdm_jax.evaluation.extractors import Extractor
from fdm_jax.evaluation.inception_score import inception_score
from fdm_jax.evaluation.kernel import kernel_distance
from fdm_jax.evaluation.measures import measure
from fdm_jax.evaluation.moments import Moments, moments
from fdm_jax.evaluation.references import Reference

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_draws_whatever_ran_before():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def test_moments_do_not_depend_on_how_features_are_cut_up():
    """100,000 features in batches of 1 to 999."""
    features = (RNG.standard_normal((100_000, 24)) @ RNG.standard_normal((24, 24)) + 100).astype(np.float32)
    mean, covariance = np.mean(features, axis=0, dtype=np.float64), np.cov(features.astype(np.float64), rowvar=False)
    counted, start = Moments(24), 0
    while start < len(features):
        size = int(RNG.integers(1, 1000))
        counted.add(features[start : start + size])
        start += size
    got = counted.result()
    assert counted.count == 100_000
    np.testing.assert_allclose(got[0], mean, rtol=1e-10)
    np.testing.assert_allclose(got[1], covariance, rtol=1e-10, atol=1e-10 * np.abs(covariance).max())


def test_single_features_and_the_callers_array():
    features = RNG.standard_normal((5, 3))
    counted = Moments(3)
    for row in features:
        row = row[None].copy()
        counted.add(row)
        row[:] = np.nan  # a buffer that is used again
    np.testing.assert_allclose(counted.result()[1], np.cov(features, rowvar=False), rtol=1e-12)


def test_features_that_are_not_finite_or_too_few():
    bad = np.zeros((4, 2))
    bad[2, 1] = np.nan
    with pytest.raises(UserError, match="features of 1 of 4 images are not finite, image 2 first"):
        moments(bad)
    with pytest.raises(UserError, match="two images or more, and there are 1"):
        moments(bad[:1])


def test_kernel_distance_is_the_plain_loops():
    a, b = RNG.standard_normal((6, 4)), RNG.standard_normal((7, 4)) + 0.3
    kernel = lambda x, y: (x @ y / 4 + 1) ** 3  # noqa: E731
    rng = np.random.default_rng(3)
    expected = []
    for _ in range(5):
        x, y = a[rng.choice(6, 5, replace=False)], b[rng.choice(7, 5, replace=False)]
        within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(5) for j in range(5) if i != j) / 20
        expected.append(within - 2 * sum(kernel(u, v) for u in x for v in y) / 25)
    got = kernel_distance(a, b, subsets=5, subset_size=5, seed=3)
    np.testing.assert_allclose(got, (np.mean(expected), np.std(expected)), rtol=1e-12)


def test_kernel_distance_of_whole_sets_has_no_deviation():
    """Subsets of all images differ by rounding alone, and that is not how sure the figure is."""
    a, b = RNG.standard_normal((2, 20, 4))
    whole, deviation = kernel_distance(a, b)
    assert deviation is None
    parts, deviation = kernel_distance(a, b, subsets=2000, subset_size=15)
    assert abs(parts - whole) < 4 * deviation / np.sqrt(2000)


def test_kernel_distance_is_unbiased():
    """Sets of one distribution have a mean of 0, of any size."""
    values = [kernel_distance(*RNG.standard_normal((2, 20, 4)), subsets=1)[0] for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20
    assert kernel_distance(RNG.standard_normal((500, 4)), RNG.standard_normal((500, 4)) + 1)[0] > 1


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_scikit_learns_neighbours(k):
    rng = np.random.default_rng(k)
    real, generated = rng.standard_normal((150, 5)), rng.standard_normal((120, 5)) * 0.7 + 0.5

    def covered(points, centres):
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centres).kneighbors(centres)[0][:, -1]
        return np.mean([(np.linalg.norm(point - centres, axis=1) <= radii).any() for point in points])

    precision, recall = precision_recall(generated, real, k)
    assert precision == pytest.approx(covered(generated, real))
    assert recall == pytest.approx(covered(real, generated))
    assert 0 < recall < precision < 1


def test_precision_and_recall_of_extremes():
    x = RNG.standard_normal((60, 4))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x + 100, x) == (0, 0)
    assert precision_recall(x[:10], x)[0] == 1 > precision_recall(x[:10], x)[1]


def test_a_point_on_the_rim_is_covered():
    """At 0, 1 and 3 the nearest neighbour is 1, 1 and 2 away: -1 and 5 lie just so far from one, -2 and 6 do not."""
    real = np.array([[0.0], [1.0], [3.0]])
    assert precision_recall(np.array([[-1.0], [5.0], [-2.0], [6.0]]), real, k=1)[0] == 0.5


def test_blocks_make_no_difference(monkeypatch):
    from fdm_jax.evaluation import coverage

    real, generated = RNG.standard_normal((70, 3)), RNG.standard_normal((50, 3))
    whole = precision_recall(generated, real)
    monkeypatch.setattr(coverage, "_BLOCK", 16)
    assert precision_recall(generated, real) == whole


def test_inception_score_in_closed_form():
    """Certain and even over K classes: K.  The same for every image: 1."""
    certain = 1000.0 * np.eye(5)[np.arange(100) % 5]
    assert inception_score(certain, splits=4) == pytest.approx((5, 0))
    assert inception_score(np.tile(RNG.standard_normal(5), (100, 1))) == pytest.approx((1, 0))
    logits = RNG.standard_normal((40, 6))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    scores = [np.exp(np.mean([scipy.stats.entropy(q, part.mean(0)) for q in part])) for part in np.split(p, 2)]
    assert inception_score(logits, splits=2) == pytest.approx((np.mean(scores), np.std(scores)))


def test_images_sorted_by_class():
    """As folders and data sets often are: parts of them must not be of a few classes."""
    centres = RNG.standard_normal((10, 4)) * 20
    sorted_, mixed = np.repeat(np.arange(10), 40), RNG.integers(0, 10, 400)
    real, generated = (centres[of] + RNG.standard_normal((400, 4)) for of in (sorted_, mixed))
    reference = Reference(*moments(real), real)
    extractor = Extractor("inception", 4, None, {}, lambda variables, images: (images, None))
    metrics, logits = ["precision-recall", "inception-score"], 1000.0 * np.eye(10)[sorted_]
    figures = measure(generated, logits, reference, extractor, metrics, coverage_images=100)
    assert figures["precision"]["value"] > 0.5 and figures["recall"]["value"] > 0.5
    assert figures["inception_score"]["value"] == pytest.approx(9, abs=1)


def test_bad_sets():
    a = np.zeros((5, 3))
    with pytest.raises(UserError, match="of one width"):
        kernel_distance(a, np.zeros((5, 4)))
    with pytest.raises(UserError, match="more than 3 features"):
        precision_recall(a[:3], a)
    with pytest.raises(UserError, match="of one width"):
        precision_recall(a, np.zeros((5, 4)))
    with pytest.raises(UserError, match="10 splits takes as many images"):
        inception_score(a)
