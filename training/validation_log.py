"""The validations of a run so far, the best one, and whether the run should end."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from echo4o.common import files, strict_json
from echo4o.training.validation_result import VALIDATION_FILE, ValidationResult, read_validations


class ValidationLog:
    """Results by step; equal on all processes. The main process writes them to `validation_log.jsonl`.

    Args:
        stop_after: end after this many results without a lower loss; None: never.
    """

    def __init__(self, run: Path, accelerator: Accelerator, stop_after: int | None):
        self.run, self.accelerator, self.stop_after = run, accelerator, stop_after
        self.results: list[ValidationResult] = []

    def resume(self, step: int) -> None:
        """Continue a run that has done `step` steps: later results are dropped."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            found = [[result for result in read_validations(self.run) if result.step <= step]]
        self.results = broadcast_object_list(found)[0]

    def has(self, step: int) -> bool:
        """Whether this step is validated."""
        return any(result.step == step for result in self.results)

    def add(self, result: ValidationResult) -> None:
        self.results.append(result)
        if self.accelerator.is_main_process:
            lines = [strict_json.dumps(_rounded(asdict(result))) + "\n" for result in self.results]
            files.write_text(self.run / VALIDATION_FILE, "".join(lines))

    @property
    def best(self) -> ValidationResult | None:
        """The trained step with the lowest loss; of equal ones the first."""
        return min((r for r in self.results if r.step > 0), key=lambda r: r.loss, default=None)

    def would_be_best(self, result: ValidationResult) -> bool:
        return result.step > 0 and (self.best is None or result.loss < self.best.loss)

    def why_stop(self) -> str | None:
        """Why the run should end; None if it should not."""
        if self.stop_after is None or not self.results:
            return None
        lowest = min(self.results, key=lambda r: r.loss)
        since = len(self.results) - 1 - self.results.index(lowest)
        if since < self.stop_after:
            return None
        what = f"step {lowest.step}" if lowest.step else "the model before training"
        return (
            f"Stopping after step {self.results[-1].step}: the validation loss of {what} ({lowest.loss:.4f}) was not "
            f"improved in {since} validations (validation.stop_after)."
        )


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.9g}") if isinstance(value, float) else value
