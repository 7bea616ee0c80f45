"""The Inception score (Salimans et al., arXiv 1606.03498)."""

from __future__ import annotations

import numpy as np
import scipy.special

from fdm_jax.errors import UserError


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(mean over images of KL(p(class | image) || p(class))).

    Args:
      logits: [N, K].
      splits: parts of the images, in order, that are scored on their own.

    Returns:
      Mean and standard deviation over the splits.

    Raises:
      UserError: fewer images than splits.
    """
    if len(logits) < splits:
        raise UserError(f"The Inception score in {splits} splits takes as many images or more, not {len(logits)}.")
    scores = []
    for part in np.array_split(np.asarray(logits, np.float64), splits):
        log_p = scipy.special.log_softmax(part, axis=1)
        log_mean = scipy.special.logsumexp(log_p, axis=0) - np.log(len(part))
        scores.append(np.exp(np.mean(np.sum(np.exp(log_p) * (log_p - log_mean), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))
