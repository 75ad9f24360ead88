"""Intervals and tests over prompts. A prompt is the unit: its pictures and repeats are averaged first."""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
_BLOCK = 500  # resamples at once, to bound memory

Aggregates = Callable[[dict[str, int]], dict[str, dict[str, float]]]


def group_means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {group: float(np.mean(of)) for group, of in values.items() if len(of)}


def overall(values: Mapping[str, Sequence[float]], aggregates: Aggregates) -> dict[str, float]:
    """The overall numbers of prompts' values by group."""
    means = group_means(values)
    if not means:
        return {}
    weights = aggregates({group: len(of) for group, of in values.items()})
    return {name: sum(w * means[group] for group, w in of.items()) for name, of in weights.items()}


def bootstrap(
    values: Mapping[str, Sequence[float]], aggregates: Aggregates, seed: int = 0, scale: float | None = None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """95% percentile intervals of the overall numbers and of the groups' means.

    Prompts are drawn with replacement within each group, because the benchmark fixes how many prompts a group has.
    Where all values are 0 or all are 1 (`scale` 1), a bootstrap has no spread to show: Wilson's interval stands there.
    """
    values = {group: np.asarray(of, float) for group, of in values.items() if len(of)}
    if not values:
        return {}, {}
    rng = np.random.default_rng(seed)
    drawn = {group: _resampled_means(of, rng) for group, of in values.items()}
    weights = aggregates({group: len(of) for group, of in values.items()})
    totals = {name: sum(w * drawn[group] for group, w in of.items()) for name, of in weights.items()}
    every = np.concatenate(list(values.values()))
    return (
        {name: _interval(of, every, scale) for name, of in totals.items()},
        {group: _interval(drawn[group], of, scale) for group, of in values.items()},
    )


def _resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blocks = [
        values[rng.integers(len(values), size=(_BLOCK, len(values)))].mean(axis=1) for _ in range(RESAMPLES // _BLOCK)
    ]
    return np.concatenate(blocks)


def _interval(drawn: np.ndarray, values: np.ndarray, scale: float | None) -> list[float]:
    if scale == 1.0 and np.ptp(values) == 0 and values[0] in (0.0, 1.0):
        return list(wilson(values.sum(), len(values)))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z, share = 1.959963984540054, right / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_flip_test(differences: Mapping[str, Sequence[float]], weights: Mapping[str, float], seed: int = 0) -> float:
    """Two-sided p of "no difference": how often randomly exchanging the two results of each prompt gives a weighted
    mean difference at least as large. Exact in expectation for any distribution; never 0."""
    parts = {group: np.asarray(differences[group], float) for group in weights}
    observed = abs(sum(weights[group] * of.mean() for group, of in parts.items()))
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
    """Holm's correction of several p values, so that one chance finding among them is not taken for one."""
    adjusted, highest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
