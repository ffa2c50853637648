"""How often what was said with a probability is so: bins, and the expected calibration error."""

import numpy as np

N_BINS = 15


def reliability(
    probability: np.ndarray, right: np.ndarray, n_bins: int = N_BINS
) -> dict[str, np.ndarray]:
    """Of equal bins of [0, 1]: how many were said so, their mean probability, the share of right.

    Parameters
    ----------
    probability, right
        Of each answer, (answers,): the probability that it was given, and whether it was right.

    Returns
    -------
    ``count``, ``probability`` and ``accuracy``, (bins,) each; 0 in a bin without an answer.
    """
    probability, right = np.asarray(probability, float), np.asarray(right, float)
    place = np.minimum((probability * n_bins).astype(np.int64), n_bins - 1)
    count = np.bincount(place, minlength=n_bins)
    some = np.maximum(count, 1)
    return {
        "count": count,
        "probability": np.bincount(place, probability, n_bins) / some,
        "accuracy": np.bincount(place, right, n_bins) / some,
    }


def expected_calibration_error(bins: dict[str, np.ndarray]) -> float:
    """Σ n_b |accuracy_b − probability_b| / Σ n_b (Guo et al. 2017)."""
    count = np.asarray(bins["count"], float)
    off = np.abs(np.asarray(bins["accuracy"]) - np.asarray(bins["probability"]))
    return float((count * off).sum() / max(count.sum(), 1.0))
