"""What a dear judge would give on everything, from its scores of a random sample and a cheap judge's scores of all.

A difference estimator with a tuned weight for a finite population (prediction-powered inference, Angelopoulos et al.
2023, arXiv 2301.09633 and 2311.01453; Särndal et al. 1992, chapter 6): per group, the mean of the first judge over all
prompts times the weight, plus the mean over audited prompts of what the second judge gives beyond it. The estimand is
the second judge's score of this run: prompts are sampled, images are not, and a full audit has no error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_GROUP = 30  # audited prompts from which a group has an interval of its own
_LEVEL = 0.95
# Small strata borrow the common variance with this weight, in observations.
_BORROWED = 4.0
# A sample without a disagreement is not proof that there is none: three images that differ by the whole scale are added to
# the residuals, which count as much as four of them at least. With less, rare disagreements are covered too seldom
# (simulated in the tests).
_ADDED_IMAGES, _PSEUDO_IMAGES = 3.0, 4.0


@dataclass(frozen=True)
class AuditGroup:
    """A group of prompts.

    Attributes:
        first: the first judge's score of each prompt.
        audited: numbers of the audited prompts.
        second: the second judge's scores of these.
    """

    first: np.ndarray
    audited: np.ndarray
    second: np.ndarray


@dataclass(frozen=True)
class AuditEstimate:
    """The second judge's score on everything, and its interval; None where too few prompts were audited for one."""

    value: float
    interval: tuple[float, float] | None


def sample_prompts(groups: Mapping[str, Sequence[str]], share: float, seed: int) -> list[str]:
    """A random share of the prompts of every group, at least two of each, by id. More of a share extends the sample."""
    rng = np.random.default_rng(seed)
    chosen: list[str] = []
    for ids in groups.values():
        order = rng.permutation(len(ids))
        count = min(len(ids), max(2, int(np.ceil(share * len(ids) - 1e-9))))
        chosen += [str(ids[int(place)]) for place in sorted(order[:count])]
    return chosen


def tuned_weight(groups: Mapping[str, AuditGroup], weights: Mapping[str, float]) -> float:
    """The weight of the first judge, 0 to 1, that makes the interval shortest; 0 ignores it."""
    covariance = variance = 0.0
    for name, group in groups.items():
        factor = _sampling_factor(group, weights.get(name, 0.0))
        if len(group.audited) < 2 or not factor:
            continue
        first = group.first[group.audited]
        covariance += factor * float(np.cov(first, group.second)[0, 1])
        variance += factor * float(np.var(first, ddof=1))
    return float(np.clip(covariance / variance, 0.0, 1.0)) if variance > 0 else 0.0


def estimate(
    groups: Mapping[str, AuditGroup],
    weights: Mapping[str, float],
    scale: float,
    images: int = 1,
    weight: float | None = None,
) -> AuditEstimate:
    """The weighted sum of the groups' means by the second judge, on all prompts.

    Args:
        weights: of the groups' means in the number; they add up to 1.
        scale: the best score, which bounds the result.
        images: per prompt.
        weight: of the first judge; None: tuned. 0 is the audit alone.
    """
    from scipy.stats import t

    used = {name: group for name, group in groups.items() if weights.get(name)}
    if any(not len(group.audited) for group in used.values()):
        return AuditEstimate(float("nan"), None)
    lam = tuned_weight(used, weights) if weight is None else weight
    value, residuals = 0.0, {}
    for name, group in used.items():
        residuals[name] = group.second - lam * group.first[group.audited]
        value += weights[name] * (lam * group.first.mean() + residuals[name].mean())
    degrees = sum(len(values) - 1 for values in residuals.values()) - (1 if weight is None else 0)
    variance = _variance(used, weights, residuals, scale, images)
    if degrees < 1:
        return AuditEstimate(value, None)
    half = float(t.ppf((1 + _LEVEL) / 2, degrees)) * float(np.sqrt(variance))
    bounds = (max(0.0, value - half), min(scale, value + half))
    return AuditEstimate(float(np.clip(value, 0.0, scale)), bounds)


def _sampling_factor(group: AuditGroup, weight: float) -> float:
    """What the variance of residuals is multiplied by: with the finite-population correction."""
    count, total = len(group.audited), len(group.first)
    return weight**2 * (1 - count / total) / count if count else 0.0


def _variance(
    groups: Mapping[str, AuditGroup],
    weights: Mapping[str, float],
    residuals: Mapping[str, np.ndarray],
    scale: float,
    images: int,
) -> float:
    squares = {name: float(((values - values.mean()) ** 2).sum()) for name, values in residuals.items()}
    degrees = sum(len(values) - 1 for values in residuals.values())
    unit = scale**2 / images  # one image that differs by the whole scale
    common = max(sum(squares.values()) + _ADDED_IMAGES * unit, _PSEUDO_IMAGES * unit) / max(1, degrees)
    total = 0.0
    for name, group in groups.items():
        own = (squares[name] + _BORROWED * common) / (len(residuals[name]) - 1 + _BORROWED)
        total += _sampling_factor(group, weights[name]) * own
    return total
