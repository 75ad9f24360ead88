"""Accuracies of Shapes-4o by tag, with Wilson's interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special


@dataclass(frozen=True)
class Accuracy:
    """A share of right images with its 95% interval (Wilson's, which also holds at 0 and 1 and for few images)."""

    right: int
    of: int

    @property
    def mean(self) -> float:
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.of)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.2f} [{low:.2f}, {high:.2f}] ({self.right}/{self.of})"


def wilson(right: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share.

    Raises:
        ValueError: not 0 <= right <= of with of at least 1.
    """
    if of < 1 or not 0 <= right <= of:
        raise ValueError(f"wilson: {right} right of {of}; of must be at least 1 and right between 0 and of")
    z = float(special.ndtri(0.5 + confidence / 2))
    share, weight = right / of, z * z / of
    centre = (share + weight / 2) / (1 + weight)
    half = z * np.sqrt(share * (1 - share) / of + weight / of / 4) / (1 + weight)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def scores_by_tag(tags: Sequence[str], right: Sequence[bool]) -> dict[str, Accuracy]:
    """The accuracy of each tag in the order of appearance, then of all images as "overall"."""
    if len(tags) != len(right) or not tags:
        raise ValueError(f"scores_by_tag: {len(tags)} tags and {len(right)} results; they must be equally many, not 0")
    by_tag = {tag: [ok for other, ok in zip(tags, right) if other == tag] for tag in dict.fromkeys(tags)}
    scores = {tag: Accuracy(sum(oks), len(oks)) for tag, oks in by_tag.items()}
    return scores | {"overall": Accuracy(sum(map(bool, right)), len(right))}
