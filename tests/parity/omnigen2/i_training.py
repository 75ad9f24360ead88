"""Training: rows to samples, times, the released schedules, and the updates of the original's script."""

from __future__ import annotations

import importlib

from ..golden import GoldenFile
from ..report import Check
from .golden_set import GoldenSet

MODULES = {
    "i_data": "i_data",
    "i_time": "i_time",
    "i_train_full": "i_updates",
    "i_train_lora": "i_updates",
}


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    if file.name not in MODULES:
        check.fail("", "no check of this file")
        return
    importlib.import_module(f".{MODULES[file.name]}", __package__).check(golden, file, check)
