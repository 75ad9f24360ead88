"""Inference with a cache. Every `c_*` file may hold a chain of prefills, velocities after it, and trajectories."""

from __future__ import annotations

from ..golden import GoldenFile
from ..report import Check
from . import c_prefill, c_trajectories
from .golden_set import GoldenSet


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    if "prefill" in file.json or "flow" in file.json:
        with check.trying("prefill"):
            c_prefill.check(golden, file, check)
    for name, case in file.json["trajectories"].items():
        with check.trying(name):
            c_trajectories.check(golden, file.json["transforms"], case, file.tensors.under(name), check.of(name))
