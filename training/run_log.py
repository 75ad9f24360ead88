"""The log of a run: one entry per optimizer step, and what is derived from it."""

from __future__ import annotations

from echo4o.common import strict_json

LOG_FILE = "train_log.jsonl"
# The phases of a step, one after the other: waiting for its batches (and, with several processes, for the slowest
# one's), forward and backward passes, the update with the exchange of the gradient's norm.
PHASES = ("data", "compute", "optimizer")


def rounded(entry: dict) -> dict:
    """An entry as it is stored: nine significant digits keep a float32 exactly."""
    return {key: value if key == "step" else float(f"{value:.9g}") for key, value in entry.items()}


def to_lines(log: list[dict]) -> str:
    """A log as JSON lines."""
    return "".join(strict_json.dumps(rounded(entry)) + "\n" for entry in log)


def smoothed(log: list[dict], window: int = 50) -> float:
    """Mean loss of the last steps."""
    recent = log[-window:]
    return sum(entry["loss"] for entry in recent) / len(recent)


def phase_shares(log: list[dict], window: int = 50) -> dict[str, float]:
    """The share of each phase in the time of the last steps: it shows the bottleneck."""
    sums = {phase: sum(entry[f"{phase}_seconds"] for entry in log[-window:]) for phase in PHASES}
    return {phase: seconds / (sum(sums.values()) or 1) for phase, seconds in sums.items()}
