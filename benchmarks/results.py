"""Ratios with their targets: one table at the end of a run, a JSON file, and the comparison of two files."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class Ratio:
    """A measured ratio.

    Args:
        median, low, high: of the rounds; `low` and `high` bound their middle half.
        at_most, at_least: the target, if there is one.
    """

    median: float
    low: float
    high: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without a target."""
        if self.at_most is not None:
            return self.median <= self.at_most
        return self.median >= self.at_least if self.at_least is not None else None


@dataclass
class BenchmarkResults:
    """The ratios of one run, by name, and the machine that they were measured on."""

    ratios: dict[str, Ratio] = field(default_factory=dict)
    machine: str = ""

    def add(
        self, name: str, values: Sequence[float], *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Add the ratio of every round under a name, with its target."""
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 2 else (min(values), 0, max(values))
        self.ratios[name] = Ratio(statistics.median(values), low, high, at_most, at_least)

    def table(self) -> str:
        """Every ratio with its target, as a Markdown table."""
        lines = ["| ratio | measured (middle half) | target | met |", "|---|---|---|---|"]
        for name, ratio in self.ratios.items():
            met = {None: "", True: "yes", False: "no"}[ratio.met]
            lines.append(f"| {name} | {_shown(ratio)} | {ratio.target} | {met} |")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "BenchmarkResults":
        """The results of a file. Raises ValueError if `write` did not write it."""
        try:
            stored = json.loads(path.read_text())
            return cls({name: Ratio(**values) for name, values in stored["ratios"].items()}, stored["machine"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of `python -m benchmarks`: {error}") from error


def machine(device: str) -> str:
    """The machine and the versions that times depend on."""
    card = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {card}, on {device}"


def compare(before: BenchmarkResults, after: BenchmarkResults) -> str:
    """Two runs side by side. A difference counts where the middle halves do not overlap."""
    lines = []
    if before.machine != after.machine:
        lines += [f"different machines: {before.machine} and {after.machine}", ""]
    lines += ["| ratio | before | after | change |", "|---|---|---|---|"]
    for name in dict.fromkeys([*before.ratios, *after.ratios]):
        one, two = before.ratios.get(name), after.ratios.get(name)
        change = "only in one"
        if one and two:
            apart = one.high < two.low or two.high < one.low
            change = f"{two.median / one.median - 1:+.0%}" if apart else "within the spread"
        lines.append(f"| {name} | {_shown(one)} | {_shown(two)} | {change} |")
    return "\n".join(lines)


def _shown(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else ""
