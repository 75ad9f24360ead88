"""Intervals and tests over prompts. A prompt is the unit: its pictures and repeats are averaged first."""

from collections.abc import Callable, Mapping, Sequence

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
    values: Mapping[str, Sequence[float]], aggregates: Aggregates, seed: int = 0, binary: bool = False
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """95% percentile intervals of the overall numbers and of the groups' means.

    Prompts are drawn with replacement within each group, because the benchmark fixes how many prompts a group has.
    A group that is all right or all wrong has no spread that could be resampled, which is not certainty: for `binary`
    scores its mean is drawn from Jeffreys' posterior, Beta(right + 1/2, wrong + 1/2).
    """
    values = {group: np.asarray(of, float) for group, of in values.items() if len(of)}
    if not values:
        return {}, {}
    rng = np.random.default_rng(seed)
    drawn = {group: _resampled_means(of, rng, binary) for group, of in values.items()}
    weights = aggregates({group: len(of) for group, of in values.items()})
    totals = {name: sum(w * drawn[group] for group, w in of.items()) for name, of in weights.items()}
    points = overall(values, aggregates)
    return (
        {name: _interval(of, points[name]) for name, of in totals.items()},
        {group: _interval(drawn[group], of.mean()) for group, of in values.items()},
    )


def _resampled_means(values: np.ndarray, rng: np.random.Generator, binary: bool) -> np.ndarray:
    if binary and np.ptp(values) == 0 and values[0] in (0.0, 1.0):
        right = values.sum()
        return rng.beta(right + 0.5, len(values) - right + 0.5, RESAMPLES)
    blocks = [
        values[rng.integers(len(values), size=(_BLOCK, len(values)))].mean(axis=1) for _ in range(RESAMPLES // _BLOCK)
    ]
    return np.concatenate(blocks)


def _interval(drawn: np.ndarray, point: float) -> list[float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [min(float(low), float(point)), max(float(high), float(point))]


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
