"""Runs every check that a golden directory calls for, and reports whatever in it no check looked at."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable
from pathlib import Path

from .forms import FORMS, form_of
from .golden import GoldenFile
from .report import Report

REST = "m"  # for `only`: the manifest, the pictures, and everything else in the directory


def run(directory: str | Path, only: Iterable[str] | None = None, quiet: bool = False) -> Report:
    """Check `directory` as its form asks.

    Args:
        only: beginnings of the names of the files to check, and [`REST`]; None: all of them.

    Raises:
        UnknownForm: `directory` is not a golden directory of a known form.
    """
    started, name, report = time.perf_counter(), form_of(directory), Report(quiet=quiet)
    checks = FORMS[name].checks
    golden = importlib.import_module(f".{name}.golden_set", __package__).GoldenSet(directory)
    chosen = sorted(only or [*checks, REST])
    for prefix in chosen:
        if prefix != REST:
            _check_kind(golden, report, prefix, f".{name}.{checks[prefix]}")
    if REST in chosen:
        rest = importlib.import_module(f".{name}.rest", __package__)
        rest.check(golden, report)
        _check_names(golden.directory, report, set(checks), rest.FILES)
    if not quiet:
        note = f" (only {', '.join(chosen)})" if only else ""
        print(f"{report.summary()}; {name}, {time.perf_counter() - started:.0f} s{note}", flush=True)
    return report


def _check_kind(golden, report: Report, prefix: str, module: str) -> None:
    """Check all files whose names begin with `prefix`."""
    stems = sorted({path.stem for path in golden.directory.iterdir() if path.name.startswith(f"{prefix}_")})
    if not stems:
        report.at(f"{prefix}_*").fail("", "no such file in the directory: nothing of its kind was checked")
    for stem in stems:
        check = report.at(stem)
        with check.trying():
            file = GoldenFile(golden.directory / f"{stem}.json")
            file.check_table(check)
            with check.trying():
                importlib.import_module(module, __package__).check(golden, file, check)
            file.check_coverage(check)


def _check_names(directory: Path, report: Report, prefixes: set[str], others: set[str]) -> None:
    """A failed row for every file that neither a check nor the form's `rest` looks after."""
    for path in sorted(directory.iterdir()):
        data = path.suffix in (".json", ".safetensors") and path.name.partition("_")[0] in prefixes
        if not data and path.name not in others:
            report.at(path.name).fail("", "file not checked")
