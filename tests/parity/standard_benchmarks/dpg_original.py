"""How the original forms what echo4o forms otherwise: its question dictionary, and categories of last images only.

For tests alone: these are the errors of the original that the golden data shows.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas

from echo4o.evaluation.benchmarks.dpg.scoring import DPGQuestion


def read_table(text: str) -> dict[str, Any]:
    """The original's question dictionary: without the first row, and with the last block of each prompt only."""
    table, before = {}, None
    for number, row in pandas.read_csv(io.StringIO(text)).iterrows():
        if number == 0:
            continue
        if row.item_id != before:
            table[row.item_id] = {"qid2tuple": {}, "qid2dependency": {}, "qid2question": {}}
        before = row.item_id
        identifier, kinds = str(int(row.proposition_id)), table[row.item_id]
        kinds["qid2tuple"][identifier] = row.tuple
        kinds["qid2dependency"][identifier] = [int(part) for part in row.dependency.split(",")]
        kinds["qid2question"][identifier] = row.question_natural_language
    return {str(item): kinds for item, kinds in table.items()}


def last_image_categories(
    prompts: Sequence[tuple[Sequence[DPGQuestion], Sequence[Mapping[int, bool]]]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Broad and detailed categories in percent: raw answers of each prompt's last image, without the dependency rule."""
    pools = defaultdict(list), defaultdict(list)
    for questions, images in prompts:
        for question in questions:
            value = float(images[-1][question.id])
            pools[0][question.broad_category].append(value)
            pools[1][question.category].append(value)
    broad, detailed = ({name: 100 * fmean(of) for name, of in pool.items()} for pool in pools)
    return broad, detailed


def black_images(grid: Sequence[int], side: int) -> list[bool]:
    """Which of the four images of a grid file (width, height) lie beyond it and are black in the original."""
    return [column * side >= grid[0] or row * side >= grid[1] for row in (0, 1) for column in (0, 1)]
