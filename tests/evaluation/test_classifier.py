"""The classifier learns to read digits, and its features come out with a deviation of one."""

import numpy as np

from fdm_jax.evaluation import classifier


def test_it_learns(digits):
    images, labels = digits
    reports = []
    fitted = classifier.fit(
        images[300:], labels[300:], (images[:300], labels[:300]), "digits",
        steps=40, report=lambda done, loss: reports.append((done, loss)),
    )  # fmt: skip
    assert fitted.accuracy > 0.75  # of ten classes; where nothing is learned, 0.1
    [(done, loss)] = reports
    assert done == 40 and loss < 1  # nats; log 10 where nothing is learned
    features, logits = fitted.apply(fitted.params, images)
    assert fitted.accuracy == np.mean(logits[:300].argmax(-1) == labels[:300])
    np.testing.assert_allclose(features[300:].std(axis=0), 1, rtol=1e-3)
    assert (fitted.classes, fitted.image_shape, fitted.data) == (10, (8, 8, 1), "digits")
