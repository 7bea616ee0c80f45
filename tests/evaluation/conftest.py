import numpy as np
import pytest

from fdm_jax.data.digits import load_digits_arrays


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """All of scikit-learn's, shuffled: uint8 [1797, 8, 8, 1] and labels."""
    images, labels = load_digits_arrays("all", tmp_path_factory.mktemp("digits"))
    order = np.random.default_rng(1).permutation(len(images))
    return images[order], labels[order]
