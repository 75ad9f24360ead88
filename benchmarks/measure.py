"""Times that can be compared: warmed up, taken in turns, with their spread."""

import statistics
import time
from collections.abc import Callable

import torch


def in_turns(ways: dict[str, Callable[[], object]], repeats: int = 3) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times each, after one warm-up.

    The ways take turns, so that a slow moment of the machine falls on all of them.
    """
    for run in ways.values():
        run()
    times = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            times[name].append(time.perf_counter() - start)
    return times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, times: dict[str, list[float]]) -> str:
    """Median, spread and ratio to the first way, as lines of text."""
    lines = [title]
    base = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
        lines.append(f"  {name:<44} {median:8.3f} s  ({spread})  x{median / base:.2f}")
    return "\n".join(lines)
