"""A golden directory of the standard benchmarks: two JSON files, without a manifest."""

from __future__ import annotations

from pathlib import Path


class GoldenSet:
    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
