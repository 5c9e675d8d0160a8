"""Figures with intervals."""

import numpy as np


def bootstrap_interval(
    values: np.ndarray, clusters: np.ndarray | None = None, *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `values` (N,) and its 95 % percentile interval, resampling clusters (such as prompts) with replacement.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("values is empty; an interval needs at least one")
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    _, index = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(index, values), np.bincount(index)
    draws = np.random.default_rng(seed).integers(len(sums), size=(num_resamples, len(sums)))
    means = sums[draws].sum(1) / counts[draws].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
