"""Intervals and tests over prompts. The unit is a prompt: its images and repeats are averaged first."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
_BLOCK = 500  # resamples at once, to bound memory

Aggregates = Callable[[dict[str, int]], dict[str, dict[str, float]]]


def group_means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the mean of each group that has values."""
    return {group: float(np.mean(scores)) for group, scores in values.items() if len(scores)}


def overall(values: Mapping[str, Sequence[float]], aggregates: Aggregates) -> dict[str, float]:
    """Returns the overall numbers from the values of prompts by group."""
    means = group_means(values)
    if not means:
        return {}
    weights = aggregates({group: len(of) for group, of in values.items()})
    return {name: sum(w * means[group] for group, w in shares.items()) for name, shares in weights.items()}


def bootstrap(
    values: Mapping[str, Sequence[float]], aggregates: Aggregates, seed: int = 0, binary: bool = False
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """95% percentile intervals of the overall numbers and of the groups' means.

    Prompts are sampled with replacement within each group, because the benchmark fixes how many prompts a group has.
    If all prompts of a group are correct, or all wrong, resampling would give an interval of width 0. For `binary`
    scores the mean of such a group is sampled from Jeffreys' posterior, Beta(correct + 1/2, wrong + 1/2).
    """
    arrays = {group: np.asarray(scores, float) for group, scores in values.items() if len(scores)}
    if not arrays:
        return {}, {}
    rng = np.random.default_rng(seed)
    sampled = {group: _resampled_means(scores, rng, binary) for group, scores in arrays.items()}
    weights = aggregates({group: len(scores) for group, scores in arrays.items()})
    zero = np.zeros(RESAMPLES)
    totals = {name: sum((w * sampled[group] for group, w in shares.items()), zero) for name, shares in weights.items()}
    points = overall({group: scores.tolist() for group, scores in arrays.items()}, aggregates)
    return (
        {name: _interval(total, points[name]) for name, total in totals.items()},
        {group: _interval(sampled[group], scores.mean()) for group, scores in arrays.items()},
    )


def _resampled_means(values: np.ndarray, rng: np.random.Generator, binary: bool) -> np.ndarray:
    if binary and np.ptp(values) == 0 and values[0] in (0.0, 1.0):
        right = values.sum()
        return rng.beta(right + 0.5, len(values) - right + 0.5, RESAMPLES)
    blocks = [
        values[rng.integers(len(values), size=(_BLOCK, len(values)))].mean(axis=1) for _ in range(RESAMPLES // _BLOCK)
    ]
    return np.concatenate(blocks)


def _interval(sampled: np.ndarray, point: float) -> list[float]:
    low, high = np.quantile(sampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [min(float(low), float(point)), max(float(high), float(point))]


def sign_flip_test(differences: Mapping[str, Sequence[float]], weights: Mapping[str, float], seed: int = 0) -> float:
    """Two-sided p of "no difference": how often randomly exchanging the two results of each prompt gives a weighted
    mean difference at least as large. Exact in expectation for any distribution; never 0."""
    parts = {group: np.asarray(differences[group], float) for group in weights}
    observed = abs(sum(weights[group] * values.mean() for group, values in parts.items()))
    rng = np.random.default_rng(seed)
    extreme = 0
    for _ in range(RESAMPLES // _BLOCK):
        total = np.zeros(_BLOCK)
        for group, of in parts.items():
            signs = rng.integers(2, size=(_BLOCK, len(of))) * 2 - 1
            total += weights[group] * (signs * of).mean(axis=1)
        extreme += int((np.abs(total) >= observed - 1e-12).sum())
    return (extreme + 1) / (RESAMPLES + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Corrects several p values by Holm's method, which bounds the probability of any false positive."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
