"""Skips optimizer steps whose gradient norm is far above that of the steps before."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 50  # norms of the median
FIRST = 10  # norms that the median needs
IN_A_ROW = 10  # skipped steps after which a run ends


class GradientSpikes(RuntimeError):
    """Too many steps in a row were skipped."""


class SpikeFilter:
    """Decides which steps are skipped, from the gradient norms of the steps that were not.

    Args:
        factor: a step is skipped if its norm exceeds this multiple of the running median.
    """

    def __init__(self, factor: float):
        self.factor, self.norms, self.in_a_row = factor, deque[float](maxlen=WINDOW), 0

    @property
    def median(self) -> float:
        """The median of the last norms; infinite before there are enough."""
        return statistics.median(self.norms) if len(self.norms) >= FIRST else math.inf

    def skips(self, norm: float) -> bool:
        """Whether to skip the step with this norm. A norm that is not finite is always skipped."""
        if not math.isfinite(norm) or norm > self.factor * self.median:
            self.in_a_row += 1
            return True
        self.norms.append(norm)
        self.in_a_row = 0
        return False

    def check(self, step: int, ids: list[str]) -> None:
        """Raise GradientSpikes if too many steps were skipped without one in between."""
        if self.in_a_row >= IN_A_ROW:
            raise GradientSpikes(
                f"{IN_A_ROW} steps in a row, up to step {step}, had gradient norms above {self.factor:g} times the "
                f"median of {self.median:.3g} (optimizer.skip_above). Samples of the last one: {', '.join(ids[:8])}."
            )

    def state(self) -> dict:
        return {"norms": list(self.norms), "in_a_row": self.in_a_row}

    def load_state(self, state: dict) -> None:
        self.norms.extend(state["norms"])
        self.in_a_row = state["in_a_row"]
