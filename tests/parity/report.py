"""Rows of the parity report: what was compared, how far it was off, how far it may be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

EXACT = 0.0  # token ids, sizes, masks, indices, texts
SINGLE = 1e-4  # one forward pass
TRAJECTORY = 3e-4  # several passes, each fed with the one before
PICTURE = 1.0  # uint8: float noise may fall on either side of a truncation


@dataclass(frozen=True)
class Row:
    """One line of the report. `error` is None where nothing could be compared; `message` then says why."""

    file: str
    case: str
    error: float | None
    tolerance: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """NaN and infinite errors do not pass: every comparison with NaN is false."""
        return self.error is not None and math.isfinite(self.error) and self.error <= self.tolerance

    def __str__(self) -> str:
        error = "-" if self.error is None else f"{self.error:.2e}"
        verdict = "pass" if self.passed else "FAIL"
        line = f"{self.file:<28} {self.case:<64} {error:>9} {self.tolerance:>8.0e}  {verdict}"
        return f"{line}  {self.message}" if self.message else line


@dataclass
class Report:
    """All rows of one run, printed as they come."""

    rows: list[Row] = field(default_factory=list)
    quiet: bool = False

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if not self.quiet:
            print(row, flush=True)

    def at(self, file: str, case: str = "") -> Check:
        return Check(self, file, case)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.passed]

    def summary(self) -> str:
        failed = len(self.failures)
        verdict = "FAIL" if failed or not self.rows else "pass"
        worst = {}  # tolerance -> the row that came closest to it
        for row in self.rows:
            if row.passed and row.error >= (worst[row.tolerance].error if row.tolerance in worst else 0):
                worst[row.tolerance] = row
        largest = ", ".join(f"{row.error:.1e} of {limit:.0e}" for limit, row in sorted(worst.items()) if limit)
        detail = f"; largest errors that pass: {largest}" if largest else ""
        return f"{verdict}: {len(self.rows)} checks, {failed} failed{detail}"


@dataclass(frozen=True)
class Check:
    """Adds rows about one file and one case of it."""

    report: Report
    file: str
    case: str = ""

    def of(self, part: object) -> Check:
        """The same for a part of this case."""
        return Check(self.report, self.file, self._name(part))

    def __call__(self, part: object, got: Any, want: Any, tolerance: float = EXACT) -> None:
        """Compare tensors, arrays, numbers, (nested) lists or texts. A shape that differs is a failure."""
        error, message = distance(got, want)
        self.report.add(Row(self.file, self._name(part), error, tolerance, message))

    def fail(self, part: object, message: str) -> None:
        self.report.add(Row(self.file, self._name(part), None, EXACT, message))

    @contextmanager
    def trying(self, part: object = "") -> Iterator[None]:
        """What is raised inside becomes a failed row; the checks after it still run."""
        try:
            yield
        except Exception as error:  # whatever it is, the report must go on
            text = " ".join(str(error).split())
            self.fail(part, f"{type(error).__name__}: {text[:300]}")

    def _name(self, part: object) -> str:
        return ".".join(str(x) for x in (self.case, part) if x != "")


def distance(got: Any, want: Any) -> tuple[float | None, str]:
    """Largest absolute difference and, when the two cannot be subtracted, what is wrong."""
    if isinstance(got, str) or isinstance(want, str) or got is None or want is None:
        return (0.0, "") if got == want else (None, f"{_short(got)} instead of {_short(want)}")
    try:
        a, b = _array(got), _array(want)
    except (TypeError, ValueError):  # ragged lists, lists with texts in them
        return (0.0, "") if got == want else (None, f"{_short(got)} instead of {_short(want)}")
    if a.shape != b.shape:
        return None, f"shape {list(a.shape)} instead of {list(b.shape)}"
    if a.size == 0:
        return 0.0, ""
    # Equal infinities (a clean picture's raw timestep) differ by nothing; any other inf or NaN shows as itself.
    with np.errstate(invalid="ignore"):
        difference = np.where(np.isinf(b) & (a == b), 0.0, np.abs(a - b))
    error = float(difference.max())
    return error, "" if math.isfinite(error) else "not finite"


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().double().cpu().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        if array.size:
            raise TypeError(f"nothing to subtract in {array.dtype}")
        array = array.astype(float)
    return array.astype(np.float64)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
