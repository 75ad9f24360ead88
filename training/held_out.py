"""The rows that validate a run and never train: a split, other datasets, or a share of the training rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from accelerate import Accelerator
from accelerate.utils import gather_object

from echo4o.common import files
from echo4o.training.columns import MappedRows
from echo4o.training.data import MAP_STYLE, RowRef, RowSource, open_sources
from echo4o.training.precompute import digest_of
from echo4o.training.recipe import RecipeError, TrainingRecipe, ValidationSettings
from echo4o.training.row_images import undecoded

FILE = "held_out.json"
MapStyle = datasets.Dataset | MappedRows
TASKS = ("text_to_image", "references", "answers")


@dataclass(frozen=True)
class ValidationRows:
    """Rows by reference, in a fixed order, and the task of each."""

    sources: list[MapStyle]
    refs: list[RowRef]
    tasks: list[str]  # of `TASKS`


def split_rows(
    recipe: TrainingRecipe, sources: list[RowSource], accelerator: Accelerator
) -> tuple[list[RowSource], ValidationRows | None]:
    """The sources to train on, and the rows to validate with (None without a `validation` section).

    Raises:
        RecipeError: there are no rows to validate with or none left to train on, or a row is on both sides.
    """
    settings = recipe.validation
    if settings is None:
        return sources, None
    if settings.share is not None:
        return _hold_out(recipe, sources, settings, accelerator)
    sections = settings.data or [
        d.model_copy(update={"split": settings.split, "streaming": False}) for d in recipe.data
    ]
    try:
        opened = open_sources(sections, targets=recipe.distill is None)
    except RecipeError as error:
        raise RecipeError(f"validation: {error}") from error
    others = [source for source in opened if isinstance(source, MAP_STYLE)]
    _check_apart(others, sources)
    numbers = [range(len(source)) for source in others]
    return sources, _chosen(others, numbers, settings.max_rows)


def _chosen(sources: list[MapStyle], numbers: Sequence[Iterable[int]], limit: int) -> ValidationRows:
    """The rows with the smallest hashes of their ids, so that a limit takes an even sample."""
    ids = [source["id"] for source in sources]
    ranked = sorted((id_hash(ids[s][n]), s, n) for s, chosen in enumerate(numbers) for n in chosen)
    refs = [RowRef(source, 0, number) for _, source, number in ranked[:limit]]
    tasks = []
    light = [
        undecoded(s).select_columns([c for c in ("reference_images", "answer") if c in s.column_names])
        for s in sources
    ]
    for ref in refs:
        row = light[ref.source][ref.row]
        tasks.append("answers" if row.get("answer") else "references" if row["reference_images"] else "text_to_image")
    return ValidationRows(sources, refs, tasks)


def id_hash(id: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(hashlib.blake2b(str(id).encode(), digest_size=7).digest(), "big") / 2**56


def _check_apart(others: list[MapStyle], sources: list[RowSource]) -> None:
    """Raise RecipeError if a validation row has the id and the instruction of a training row."""
    validated = {pair for source in others for pair in zip(source["id"], source["instruction"])}
    for source in sources:
        if isinstance(source, MAP_STYLE):
            both = validated & set(zip(source["id"], source["instruction"]))
            if both:
                raise RecipeError(
                    f"validation: {len(both)} of its rows are training rows, for example {min(both)[0]!r}. Choose "
                    "another split, or hold out a share: validation.share=0.02."
                )


# --- a share --------------------------------------------------------------------------------------------------------


def _hold_out(
    recipe: TrainingRecipe, sources: list[RowSource], settings: ValidationSettings, accelerator: Accelerator
) -> tuple[list[RowSource], ValidationRows]:
    complete = [source for source in sources if isinstance(source, MAP_STYLE)]
    assert len(complete) == len(sources) and settings.share is not None  # streaming excludes a share
    file = recipe.output_dir / FILE
    key = [settings.share, *([len(source), _digest(source["id"])] for source in complete)]
    problem = None
    if accelerator.is_main_process:
        try:
            stored = files.read_json(file) if file.is_file() else None
            if not isinstance(stored, dict) or stored.get("of") != key:
                files.write_json(file, {"of": key, "rows": held_out_rows(complete, settings.share)})
        except (ValueError, OSError) as error:
            problem = str(error)
    if problems := [text for text in gather_object([problem]) if text]:  # also waits for the file
        raise RecipeError(problems[0])
    held: list[list[int]] = files.read_json(file)["rows"]
    rest = []
    for source, numbers in zip(complete, held):
        without = set(numbers)
        rest.append(source.select([number for number in range(len(source)) if number not in without]))
    return rest, _chosen(complete, held, settings.max_rows)


def _digest(ids: Iterable[str]) -> str:
    return hashlib.blake2b("\0".join(map(str, ids)).encode(), digest_size=16).hexdigest()


def held_out_rows(sources: Sequence[MapStyle], share: float) -> list[list[int]]:
    """Numbers of the held-out rows of each source.

    Rows with the same target image or the same instruction are one group, also across sources. For rows with an answer,
    it is the images that they ask about. A group is held out if the hash of its first id is below `share`.

    Raises:
        RecipeError: none or too many rows would be held out.
    """
    places = [(source, number) for source, rows in enumerate(sources) for number in range(len(rows))]
    leader = list(range(len(places)))

    def find(row: int) -> int:
        while leader[row] != row:
            leader[row] = leader[leader[row]]
            row = leader[row]
        return row

    ids: list[str] = []
    first: dict[str, int] = {}
    for source in sources:
        names = [n for n in ("id", "instruction", "image", "reference_images", "answer") if n in source.column_names]
        rows: Any = undecoded(source).select_columns(names)
        for row in rows:
            for key in _group_keys(row):
                leader[find(len(ids))] = find(first.setdefault(key, len(ids)))
            ids.append(str(row["id"]))
    lowest: dict[int, str] = {}
    for index, id in enumerate(ids):
        group = find(index)
        lowest[group] = min(lowest.get(group, id), id)
    held: list[list[int]] = [[] for _ in sources]
    for index, (source, number) in enumerate(places):
        if id_hash(lowest[find(index)]) < share:
            held[source].append(number)
    _check_amount(sources, held, share)
    return held


def _group_keys(row: dict) -> list[str]:
    if row.get("answer"):
        if row["reference_images"]:
            return [f"asked {digest_of(row | {'image': None})}"]
        return [f"text {row['instruction']}"]
    if row.get("image") is None:  # prompts alone
        return [f"text {row['instruction']}"]
    return [f"text {row['instruction']}", f"image {digest_of(row | {'reference_images': []})}"]


def _check_amount(sources: Sequence[MapStyle], held: list[list[int]], share: float) -> None:
    rows, count = sum(map(len, sources)), sum(map(len, held))
    if not count:
        raise RecipeError(f"validation.share={share} holds out none of {rows} rows: choose a larger share.")
    if (
        any(len(numbers) == len(source) for source, numbers in zip(sources, held))
        or count > max(0.5, 2 * share) * rows
    ):
        raise RecipeError(
            f"validation.share={share} would hold out {count} of {rows} rows, because rows with the same instruction or "
            "target image stay together. Name other rows: validation.split or validation.data."
        )
