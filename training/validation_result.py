"""The result of one validation, and the file that holds those of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from echo4o.common.json_lines import JsonLines

VALIDATION_FILE = "validation_log.jsonl"


@dataclass(frozen=True)
class ValidationResult:
    """The losses of one validation: means over all labels or noised values of the rows, unweighted."""

    step: int  # optimizer steps done; 0: the model before training
    loss: float  # the sum of `losses` with the weights of the recipe
    losses: dict[str, float]  # by name
    tasks: dict[str, dict[str, float]]  # losses of the rows of each task
    times: dict[str, dict[str, float]]  # losses at each noise level
    rows: int
    exact_match: float | None = None  # share of the answers that greedy decoding gives word for word
    seconds: float = field(default=0.0, compare=False)

    def flat(self) -> dict[str, float]:
        """Numbers by name, for trackers."""
        values = {"loss": self.loss, **self.losses}
        values |= {f"{task}/{name}": v for task, losses in self.tasks.items() for name, v in losses.items()}
        values |= {f"time_{level}/{name}": v for level, losses in self.times.items() for name, v in losses.items()}
        return values | ({} if self.exact_match is None else {"exact_match": self.exact_match})


def read_validations(run: Path) -> list[ValidationResult]:
    """The validations of a run, oldest first."""
    return [ValidationResult(**entry) for entry in JsonLines(run / VALIDATION_FILE)]
