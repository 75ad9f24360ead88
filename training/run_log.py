"""The log of a run, one entry per optimizer step, and values derived from it."""

from __future__ import annotations

from echo4o.common import strict_json

LOG_FILE = "train_log.jsonl"
# Phases of a step in their order: waiting for the batches of all processes, forward and backward passes, and the update
# (with the reduction of the gradient norm).
PHASES = ("data", "compute", "optimizer")


def rounded(entry: dict) -> dict:
    """The entry as it is stored. Nine significant digits represent a float32 exactly."""
    return {key: value if key == "step" else float(f"{value:.9g}") for key, value in entry.items()}


def to_lines(log: list[dict]) -> str:
    """A log as JSON lines."""
    return "".join(strict_json.dumps(rounded(entry)) + "\n" for entry in log)


def smoothed(log: list[dict], window: int = 50) -> float:
    """Mean loss of the last steps."""
    recent = log[-window:]
    return sum(entry["loss"] for entry in recent) / len(recent)


def phase_shares(log: list[dict], window: int = 50) -> dict[str, float]:
    """The fraction of time that each phase took in the last steps."""
    sums = {phase: sum(entry[f"{phase}_seconds"] for entry in log[-window:]) for phase in PHASES}
    return {phase: seconds / (sum(sums.values()) or 1) for phase, seconds in sums.items()}
