"""Checks of the rows of a run that need no decoded image, made before the model is loaded or the first step runs."""

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from echo4o.training.columns import MappedRows, image_counts
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
        for ids, texts, counts in _facts(source):
            empty += [id for id, text in zip(ids, texts, strict=True) if _is_empty(text)]
            if max_references is not None:
                many += [id for id, count in zip(ids, counts, strict=True) if count > max_references]
    if empty:
        raise RecipeError(f"{_some(empty)} no instruction (an empty text): correct or drop them.")
    if many and max_references == 0:
        raise RecipeError(
            f"{_some(many)} references ({len(many)} in all), and this model trains text to image only: leave them out, "
            "for example with data.where.task=text_to_image."
        )
    if many:
        raise RecipeError(f"{_some(many)} more references than the model takes: {max_references} (max_references).")


def check_stored(sources: Sequence[Any], stored: Container[str], folder: Path, all_stored: bool) -> None:
    """Raise RecipeError if the rows cannot be told apart by id in a cache, or if it lacks rows that it must hold.

    Args:
        sources: those of a run; rows of a stream are checked when they are read.
        stored: the ids in the cache.
        folder: of the cache.
        all_stored: whether every row must be stored.
    """
    ids = Counter(id for source in sources for id in _ids(source))
    if twice := [id for id, count in ids.items() if count > 1 and id in stored]:
        raise RecipeError(
            f"The id {twice[0]!r} stands in more than one row ({len(twice)} such ids in all), and {folder} finds rows "
            "by their id: give every row of every dataset an id of its own."
        )
    if all_stored and (missing := [id for id in ids if id not in stored]):
        raise RecipeError(
            f"{folder} has nothing for {len(missing)} of {len(ids)} rows, for example {missing[0]!r}: run "
            "`echo4o dataset precompute` on all datasets of the run."
        )


def _is_empty(text: Any) -> bool:
    """Whether an instruction is missing. Values of other types than text are named when the row is read."""
    return text is None or (isinstance(text, str) and not text.strip())


def _facts(source: Any) -> Iterator[tuple[list, list, list[int]]]:
    """Ids, instructions and numbers of references, in batches; nothing of a stream."""
    if isinstance(source, MappedRows):
        yield from source.facts(_BATCH)
    elif isinstance(source, datasets.Dataset):
        columns = [name for name in ("id", "instruction", "reference_images") if name in source.column_names]
        plain: Any = source.select_columns(columns).with_format("arrow")
        for batch in plain.iter(_BATCH):
            counts = (
                image_counts(batch.column("reference_images")) if "reference_images" in columns else [0] * len(batch)
            )
            yield batch.column("id").to_pylist(), batch.column("instruction").to_pylist(), counts


def _ids(source: Any) -> Sequence[str]:
    """The ids of a dataset; none of a stream, or where an id is computed from the images."""
    if isinstance(source, datasets.Dataset) or (isinstance(source, MappedRows) and source.mapping.names["id"]):
        return source["id"]
    return ()


def _some(ids: list) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN]))
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"Row {shown} has" if len(ids) == 1 else f"Rows {shown}{more} have"
