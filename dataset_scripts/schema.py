"""Maps the keys of an upstream row to the dataset's columns. Known shapes are recognised; others need a mapping."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

INSTRUCTIONS = ("instruction", "instruction_list[0]")
REFERENCES = ("input_images", "input_image", "reference_images")
LISTED = "image_list"  # with output_image: the references; alone: the last image is the target
TARGET = "output_image"
CATEGORIES = ("type", "category")

_FIELD = re.compile(r"([\w.\- ]+)(\[(-?\d*)(:)?(-?\d*)\])?")


class SchemaError(ValueError):
    """The keys of the rows do not fit a known shape."""


@dataclass(frozen=True)
class RowMap:
    """Which field of an upstream row is which of our columns.

    A field is a key, perhaps with one index or slice: `output_image`, `image_list[-1]`, `image_list[:-1]`; a dot leads
    into an object (`output.path`). `reference_images` takes several fields, joined with commas.
    """

    instruction: str = "instruction"
    image: str = TARGET
    reference_images: str | None = None
    category: str | None = None

    def __post_init__(self):
        for name, text in self.to_dict().items():
            parts = text.split(",") if name == "reference_images" else [text]
            for part in parts:
                if not _FIELD.fullmatch(part):
                    raise ValueError(f"the mapping of {name} is {text!r}: a field is key, key[0], key[-1] or key[:-1]")

    def to_dict(self) -> dict[str, str]:
        """The columns that are mapped."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def keys(self) -> set[str]:
        """The row keys that are used."""
        return {_parse(part)[0].split(".")[0] for text in self.to_dict().values() for part in text.split(",")}


def recognise(keys: Iterable[str]) -> RowMap | None:
    """The mapping for a row with these keys, or None if their shape is unknown."""
    keys = set(keys)
    instruction = next((field for field in INSTRUCTIONS if field.split("[")[0] in keys), None)
    references = [key for key in REFERENCES if key in keys]
    category = next((key for key in CATEGORIES if key in keys), None)
    if instruction is None or len(references) > 1 or (references and LISTED in keys):
        return None
    if TARGET in keys:
        listed = LISTED if LISTED in keys else None
        return RowMap(instruction, TARGET, references[0] if references else listed, category)
    if LISTED in keys:
        return RowMap(instruction, f"{LISTED}[-1]", f"{LISTED}[:-1]", category)
    return None


def parse_map(pairs: Iterable[str]) -> RowMap:
    """A mapping from `column=field` pairs. Columns that are not named keep the published fields."""
    allowed = [f.name for f in fields(RowMap)]
    given = {}
    for pair in pairs:
        column, equals, field = pair.partition("=")
        if not equals or column not in allowed or not field:
            raise ValueError(f"--map {pair}: write column=field; the columns are {', '.join(allowed)}")
        given[column] = field
    return RowMap(**given)


@dataclass(frozen=True)
class FolderMapping:
    """The configuration and mapping that the user assigned to a folder of the source."""

    configuration: str | None = None
    map: RowMap | None = None


def read_plan(path: str | Path) -> dict[str, FolderMapping]:
    """Read a mapping file that `echo4o dataset inspect --write FILE` created and the user completed."""
    import yaml

    try:
        text = yaml.safe_load(Path(path).read_text("utf-8-sig"))
        folders = text["folders"]
        return {
            name: FolderMapping(entry.get("configuration"), RowMap(**entry["map"]) if entry.get("map") else None)
            for name, entry in folders.items()
        }
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        example = "folders: {FOLDER: {configuration: multi_reference, map: {image: output_image}}}"
        raise ValueError(f"{path} is not a mapping file ({error}); write {example}") from error


class FieldError(ValueError):
    """A field of a row has a value of the wrong type."""


def text_of(row: Mapping, field: str) -> str | None:
    """The text in a field; None when it is absent or null."""
    value = _get(row, field)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or isinstance(value, str):
        return value
    raise FieldError(f"{field} holds {_kind(value)} instead of text")


def label_of(row: Mapping, field: str | None) -> str:
    """A category as text."""
    value = _get(row, field) if field else None
    return value if isinstance(value, str) else "" if value is None else str(value)


def paths_of(row: Mapping, fields_: str | None) -> list[str]:
    """The image paths in one or several fields, in order. An absent field holds none."""
    paths = []
    for field in fields_.split(",") if fields_ else []:
        value = _get(row, field)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for path in values:
            if path is not None and not isinstance(path, str):
                raise FieldError(f"{field} holds {_kind(path)} instead of a path")
        paths += ["" if path is None else path for path in values]
    return paths


def _parse(field: str) -> tuple[str, str | None, str | None, str | None, str | None]:
    """The key of a field, its brackets, and in them the first number, the colon and the last number."""
    match = _FIELD.fullmatch(field)
    if match is None:
        raise ValueError(f"{field!r} is not a field: a field is key, key[0], key[-1] or key[:-1]")
    return match[1], match[2], match[3], match[4], match[5]


def _get(row: Mapping, field: str):
    key, indexed, first, colon, last = _parse(field)
    value = row.get(key)
    if value is None and "." in key:
        value = row
        for step in key.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
    if not indexed or value is None:
        return value
    if not isinstance(value, list):
        raise FieldError(f"{key} holds {_kind(value)} instead of a list")
    if colon:
        return value[int(first) if first else None : int(last) if last else None]
    try:
        return value[int(first or 0)]
    except IndexError:
        return None


def _kind(value) -> str:
    return {dict: "an object", list: "a list", bool: "a truth value"}.get(type(value), f"{type(value).__name__}")
