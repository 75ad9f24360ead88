"""Checks of the rows of a run that need no decoded image, made before the model is loaded or the first step runs."""

from collections.abc import Sequence
from typing import Any

import datasets

from echo4o.training.recipe import RecipeError

_SHOWN = 3  # rows that a message names
_BATCH = 10_000  # rows read at once; images stay on disk


def check_features(sources: Sequence[Any]) -> None:
    """Raise RecipeError for a column of another type than training reads. Streams that do not know theirs pass."""
    for source in sources:
        features = getattr(source, "features", None) or {}
        references, image = features.get("reference_images"), features.get("image")
        if isinstance(references, datasets.Image):
            raise RecipeError(
                "The column reference_images holds single images, and training reads lists of images: map it with "
                "dataset.map(lambda row: {'reference_images': [row['reference_images']]})."
            )
        if isinstance(image, datasets.List):
            raise RecipeError("The column image holds lists, and training reads one image: choose one of each list.")
        text = features.get("instruction")
        if text is not None and getattr(text, "dtype", None) not in ("string", "large_string"):
            raise RecipeError(f"The column instruction holds {text}, and training reads text (string).")


def check_rows(sources: Sequence[Any], max_references: int | None) -> None:
    """Raise RecipeError naming rows with an empty instruction, or with more references than the model takes.

    Rows of a stream are checked when they are read.
    """
    empty, many = [], []
    for source in sources:
        if not isinstance(source, datasets.Dataset):
            continue
        columns = [name for name in ("id", "instruction", "reference_images") if name in source.column_names]
        plain: Any = source.select_columns(columns).with_format("arrow")
        for batch in plain.iter(_BATCH):
            ids = batch.column("id").to_pylist()
            empty += [id for id, text in zip(ids, batch.column("instruction").to_pylist()) if not (text or "").strip()]
            if max_references is not None and "reference_images" in columns:
                many += [id for id, n in zip(ids, _lengths(batch.column("reference_images"))) if n > max_references]
    if empty:
        raise RecipeError(f"{_some(empty)} no instruction (an empty text): correct or drop them.")
    if many and max_references == 0:
        raise RecipeError(
            f"{_some(many)} references ({len(many)} in all), and this model trains text to image only: leave them out, "
            "for example with data.where.task=text_to_image."
        )
    if many:
        raise RecipeError(f"{_some(many)} more references than the model takes: {max_references} (max_references).")


def _lengths(column: Any) -> list[int]:
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made at import
    return [n or 0 for n in pc.list_value_length(column).to_pylist()]


def _some(ids: list) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN]))
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"Row {shown} has" if len(ids) == 1 else f"Rows {shown}{more} have"
