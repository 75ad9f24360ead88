"""Checks of the rows of a run that need no decoded image, made before the model is loaded or the first step runs."""

from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from echo4o.training.columns import MappedRows, image_counts
from echo4o.training.recipe import RecipeError

_SHOWN = 3  # rows that a message names
_BATCH = 10_000  # rows read at once; images stay on disk
_COMPARED = 1000  # rows with the id of another one that are compared before the first step


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


def check_stored(
    sources: Sequence[Any], stored: Container[str], prepare: Callable[[list[dict]], object], folder: Path, whole: bool
) -> None:
    """Raise RecipeError if rows that share an id differ from the one in a cache, or if it lacks rows that it must hold.

    Rows of a stream, and those whose id is computed from the images, are checked when they are read.

    Args:
        sources: those of a run, images not decoded.
        stored: the ids in the cache.
        prepare: reads rows from the cache and raises ValueError for one that differs.
        folder: of the cache.
        whole: whether every row must be stored.
    """
    ids = [_ids(source) for source in sources]
    counts = Counter(id for of_source in ids for id in of_source if id is not None)
    twice = [
        (source, number)
        for source, of_source in zip(sources, ids, strict=True)
        for number, id in enumerate(of_source)
        if id is not None and counts[id] > 1 and id in stored
    ]
    for source, number in twice[:_COMPARED]:
        row = source[number]
        try:
            prepare([row])
        except ValueError as error:
            raise RecipeError(
                f"The id {row['id']!r} stands in more than one row, and {folder} finds rows by their id ({error}): give "
                "different rows different ids."
            ) from error
    if whole and (missing := [id for id in counts if id not in stored]):
        raise RecipeError(
            f"{folder} has nothing for {len(missing)} of {len(counts)} ids, for example {missing[0]!r}: run "
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
            counts = [0] * len(batch)
            if "reference_images" in columns:
                counts = image_counts(batch.column("reference_images")).tolist()
            yield batch.column("id").to_pylist(), batch.column("instruction").to_pylist(), counts


def _ids(source: Any) -> Sequence[str | None]:
    """The ids of a dataset, None where one is computed from the images; none of a stream."""
    if isinstance(source, MappedRows):
        return source.stored_ids()
    return source["id"] if isinstance(source, datasets.Dataset) else ()


def _some(ids: list) -> str:
    shown = ", ".join(map(str, ids[:_SHOWN]))
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return f"Row {shown} has" if len(ids) == 1 else f"Rows {shown}{more} have"
