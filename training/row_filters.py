"""Filters of a dataset's rows: values of columns, and sizes of the target images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import datasets
from PIL import Image

from echo4o.training.columns import RowMapping, column_value
from echo4o.training.recipe import DataSource, RecipeError


def kept_numbers(dataset: datasets.Dataset, data: DataSource, mapping: RowMapping) -> list[int] | None:
    """Numbers of the rows that pass the filters of `data`; None without filters. Only the headers of images are read.

    Raises:
        RecipeError: a filter names an unknown column, or no row passes.
    """
    if not data.where and data.min_side is None and data.max_aspect is None:
        return None
    unknown = [name for name in data.where or {} if name.partition(".")[0] not in dataset.column_names]
    if unknown:
        raise RecipeError(
            f"data.where: {data.path} has no column {', '.join(unknown)}; there are: {', '.join(dataset.column_names)}."
        )
    by_size = data.min_side is not None or data.max_aspect is not None
    needed = {name.partition(".")[0] for name in data.where or {}}
    needed |= {name.partition(".")[0] for name in mapping.names["image"]} if by_size else set()
    columns = [name for name in dataset.column_names if name in needed]
    batches: Any = dataset.select_columns(columns).with_format("arrow").iter(batch_size=64)
    rows = enumerate(row for table in batches for row in table.to_pylist())
    kept = [
        number
        for number, row in rows
        if _has_values(row, data) and (not by_size or _has_size(_images(row, mapping), data))
    ]
    if not kept:
        raise RecipeError(f"data.where, min_side and max_aspect leave none of the {len(dataset)} rows of {data.path}.")
    return kept


def _has_values(row: dict, data: DataSource) -> bool:
    for name, allowed in (data.where or {}).items():
        if column_value(row, name) not in (allowed if isinstance(allowed, (list, tuple)) else [allowed]):
            return False
    return True


def _images(row: dict, mapping: RowMapping) -> list[dict]:
    return [image for name in mapping.names["image"] for image in mapping.images(column_value(row, name), name)]


def _has_size(images: Sequence[dict], data: DataSource) -> bool:
    """Whether the target image is large and square enough. Rows without one pass, as do images that do not open."""
    for stored in images:
        try:
            with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]) as image:
                short, long = sorted(image.size)
        except (OSError, ValueError, SyntaxError):
            continue  # reported where the row is read
        if short < (data.min_side or 0) or (data.max_aspect is not None and long > data.max_aspect * short):
            return False
    return True
