"""Figures with intervals, and areas under the curve within prompts."""

import numpy as np

Interval = tuple[float, float, float]
"""a mean, and the low and high end of its 95 % interval"""


def bootstrap_interval(values: np.ndarray, clusters: np.ndarray | None = None) -> Interval:
    """Mean of `values` (N,) and its 95 % percentile interval, resampling clusters (such as prompts) with replacement.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("values is empty; an interval needs at least one")
    clusters = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    return crossed_bootstrap(values[None], clusters)


def crossed_bootstrap(values: np.ndarray, prompts: np.ndarray, other: np.ndarray | None = None) -> Interval:
    """Mean of `values` (S, N) and its 95 % percentile interval, resampling training seeds and prompts with replacement.

    Args:
        prompts: (N,), the prompt of each column; the columns of a prompt stay together.
        other: (S', N), another arm's values of the same columns: then the mean difference `values - other`, paired by
            prompt, with the training seeds of either arm resampled on their own.

    Raises:
        ValueError: no values, or another number of columns.
    """
    mean, means = resampled_means(values, prompts, other, num_resamples=2000)
    low, high = np.quantile(means, [0.025, 0.975])
    return mean, float(low), float(high)


def resampled_means(
    values: np.ndarray, prompts: np.ndarray, other: np.ndarray | None, *, num_resamples: int
) -> tuple[float, np.ndarray]:
    """The mean, or mean difference, that `crossed_bootstrap` describes, and those of its resamples."""
    arms = [np.asarray(values, float)] + ([] if other is None else [np.asarray(other, float)])
    if any(arm.ndim != 2 or arm.shape[1] != len(prompts) or not arm.size for arm in arms):
        raise ValueError(f"values are {[arm.shape for arm in arms]}; they need one column a prompt: {len(prompts)}")
    _, index = np.unique(prompts, return_inverse=True)
    counts = np.bincount(index)
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(counts), size=(num_resamples, len(counts)))
    totals = counts[chosen].sum(1)
    means = np.zeros(num_resamples)
    for sign, arm in zip((1, -1), arms, strict=False):
        sums = np.stack([np.bincount(index, row, len(counts)) for row in arm])  # (S, prompts)
        seeds = rng.integers(len(arm), size=(num_resamples, len(arm)))
        drawn = np.stack([sums[rows].mean(0)[columns].sum() for rows, columns in zip(seeds, chosen, strict=True)])
        means += sign * drawn / totals
    return float(arms[0].mean() - (arms[1].mean() if len(arms) > 1 else 0)), means


def bootstrap_p(values: np.ndarray, prompts: np.ndarray, other: np.ndarray) -> float:
    """Two-sided p of no difference between arms, by `crossed_bootstrap`'s resamples: twice the smaller tail.

    With very few prompts, p is at least that of a sign test in which all of them agree.
    """
    _, means = resampled_means(values, prompts, other, num_resamples=10_000)
    tail = min(np.mean(means <= 0), np.mean(means >= 0))
    return float(min(1.0, 2 * max(tail, 1 / len(means), 0.5 ** len(np.unique(prompts)))))


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """p values adjusted for several tests (Holm 1979): all of those below 0.05 hold together at 5 %."""
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def area_within_prompts(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The area under the curve of each prompt that has candidates of different value.

    It is the share of pairs of different value of which the better has the higher score; equal scores count half.

    Args:
        scores, values: (P, N).
    """
    better = values[:, :, None] > values[:, None]  # (P, N, N)
    ahead = (scores[:, :, None] > scores[:, None]) + 0.5 * (scores[:, :, None] == scores[:, None])
    pairs = better.sum((1, 2))
    return ((ahead * better).sum((1, 2)) / np.maximum(pairs, 1))[pairs > 0]
