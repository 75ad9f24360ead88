"""Rows of datasets with other columns: mapped to the columns that training reads, one row at a time.

    data:
      path: owner/photos
      columns: {instruction: caption, image: photo, reference_images: [source, mask]}

Nothing is copied: a row is mapped when it is read. Images may be stored as files of bytes, structs of bytes and path, paths
(in local datasets) or addresses (with `allow_urls`). A list with one image is that image.
"""

from __future__ import annotations

import copy
import hashlib
import io
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
from PIL import Image as PILImage

from echo4o.modeling.common.image_files import open_image
from echo4o.training.recipe import ColumnNames, DataSource, RecipeError

FIELDS = ("id", "instruction", "reference_images", "image", "answer")
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "instruction", "answer")}
    | {"reference_images": datasets.List(datasets.Image()), "image": datasets.Image()}
)
pc: Any = pyarrow.compute  # its functions are made at import
URL_SECONDS, URL_BYTES = 30, 100_000_000  # limits of one download


class RowMapping:
    """Turns a row of a dataset, images not decoded, into a row for training, images not decoded.

    Args:
        columns: of the dataset.
        targets: whether rows need a target image.

    Raises:
        RecipeError: the mapping names a column that does not exist, or a needed one is not mapped.
    """

    def __init__(self, data: DataSource, columns: Sequence[str], targets: bool = True):
        given = data.columns or ColumnNames()
        names: dict[str, list[str]] = {}
        for field in FIELDS:
            chosen = getattr(given, field)
            if chosen is None:
                names[field] = [field] if field in columns else []
            else:
                names[field] = [chosen] if isinstance(chosen, str) else list(chosen)
        wrong = [name for chosen in names.values() for name in chosen if name.partition(".")[0] not in columns]
        if wrong:
            raise RecipeError(
                f"data.path={data.path} has no column {', '.join(wrong)} (data.columns); there are: {', '.join(columns)}."
            )
        missing = [field for field in ("instruction", *(["image"] if targets else [])) if not names[field]]
        if missing:
            raise RecipeError(
                f"data.path={data.path} has no column {', '.join(missing)}: name one in data.columns; there are: "
                f"{', '.join(columns)}. `echo4o dataset inspect {data.path}` proposes a mapping."
            )
        self.names, self.data = names, data
        self.base = Path(data.path) if Path(data.path).exists() else None  # paths are read for local datasets alone

    def columns(self) -> list[str]:
        """The dataset's columns that are read."""
        return list(dict.fromkeys(name.partition(".")[0] for chosen in self.names.values() for name in chosen))

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The mapped row. Raises ValueError naming the column whose value cannot be read."""
        mapped: dict[str, Any] = {"answer": None}
        for field in ("instruction", "answer"):
            for name in self.names[field]:
                mapped[field] = column_value(row, name)
        images = [image for name in self.names["image"] for image in self.images(column_value(row, name), name)]
        if len(images) > 1:
            raise ValueError(f"column {self.names['image'][0]} has {len(images)} images; give one target image.")
        mapped["image"] = images[0] if images else None
        mapped["reference_images"] = [
            image for name in self.names["reference_images"] for image in self.images(column_value(row, name), name)
        ]
        id = column_value(row, self.names["id"][0]) if self.names["id"] else None
        mapped["id"] = row_id(mapped) if id is None else str(id)
        return mapped

    def images(self, value: Any, name: str) -> list[dict[str, Any]]:
        """The images of a value, as structs of bytes and path."""
        if value is None:
            return []
        if isinstance(value, (list, tuple)):
            return [image for item in value for image in self.images(item, name)]
        if isinstance(value, (bytes, bytearray)):
            return [{"bytes": bytes(value), "path": None}]
        if isinstance(value, str):
            return [self._file(value, name)]
        if isinstance(value, PILImage.Image):
            stream = io.BytesIO()
            value.save(stream, "PNG")
            return [{"bytes": stream.getvalue(), "path": None}]
        if isinstance(value, dict) and value.get("bytes") is not None:
            return [{"bytes": value["bytes"], "path": None}]
        if isinstance(value, dict) and value.get("path"):
            return [self._file(value["path"], name)]
        raise ValueError(f"column {name} holds {type(value).__name__}, which is not an image.")

    def _file(self, place: str, name: str) -> dict[str, Any]:
        if place.partition("://")[0].lower() in ("http", "https"):
            if not self.data.allow_urls:
                raise ValueError(
                    f"column {name} holds addresses ({place[:60]}): set data.allow_urls: true to download them."
                )
            return {"bytes": _downloaded(place), "path": None}
        if self.base is None or "://" in place:
            raise ValueError(f"column {name} holds a path ({place[:60]}), which only a dataset on this machine can.")
        folder = self.base if self.base.is_dir() else self.base.parent
        return {"bytes": None, "path": str(folder / place)}


def column_value(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of a field in it: `json.caption`."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _downloaded(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=URL_SECONDS) as answer:
        data = answer.read(URL_BYTES + 1)
    if len(data) > URL_BYTES:
        raise ValueError(f"{url} is larger than {URL_BYTES / 1e6:.0f} MB.")
    return data


def row_id(row: Mapping[str, Any]) -> str:
    """An id from the content of a mapped row."""
    digest = hashlib.blake2b(digest_size=12)
    for text in (row.get("instruction"), row.get("answer")):
        digest.update(f"{text}\0".encode())
    for image in [row["image"], *row["reference_images"]]:
        stored = image or {}
        data = stored.get("bytes") or str(stored.get("path")).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class MappedRows:
    """A dataset whose rows are mapped when they are read; has the methods of `datasets.Dataset` that training uses."""

    def __init__(self, dataset: datasets.Dataset, mapping: RowMapping):
        self.dataset, self.mapping = dataset.with_format("arrow"), mapping  # arrow: images stay undecoded
        self.names: list[str] = list(FIELDS)
        self.decode = True
        self.numbers: list[int] | None = None  # of the rows in the whole dataset; None: all of them, in order

    @property
    def column_names(self) -> list[str]:
        return self.names

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        """A row by number, or the values of a column by name."""
        if isinstance(key, str):
            return [row[key] for row in self.select_columns([key])]
        table: Any = self.dataset[key]
        row = self.mapping(table.to_pylist()[0])
        if self.decode:
            row["image"] = _decoded(row["image"])
            row["reference_images"] = [_decoded(image) for image in row["reference_images"]]
        return {name: row[name] for name in self.names}

    def select(self, numbers: Sequence[int]) -> MappedRows:
        """The rows of these numbers."""
        rows = copy.copy(self)
        rows.dataset = self.dataset.select(numbers)
        rows.numbers = [self._number(number) for number in numbers]
        return rows

    def select_columns(self, names: str | Sequence[str]) -> MappedRows:
        """The same rows with these columns only."""
        rows = copy.copy(self)
        rows.names = [names] if isinstance(names, str) else list(names)
        rows.decode = self.decode and bool({"image", "reference_images"} & set(rows.names))
        if "id" not in rows.names or None not in self.stored_ids():  # else ids are computed from all columns
            needed = {name.partition(".")[0] for field in rows.names for name in self.mapping.names[field]}
            columns = [name for name in self.dataset.column_names if name in needed]
            rows.dataset = self.dataset.select_columns(columns or self.dataset.column_names[:1])  # one keeps the count
        return rows

    def facts(self, rows_at_once: int) -> Iterator[tuple[list, list, list[int]]]:
        """Ids (or numbers in the dataset, without one), instructions and numbers of references, in batches.

        Images stay on disk.
        """
        names, first = self.mapping.names, 0
        text = names["instruction"][-1]
        used = {name.partition(".")[0] for name in (*names["id"], text, *names["reference_images"])}
        columns = [name for name in self.dataset.column_names if name in used]
        batches: Any = self.dataset.select_columns(columns).iter(rows_at_once)
        for batch in batches:
            numbers = range(first, first + len(batch))
            first += len(batch)
            counts = np.zeros(len(batch), dtype=int)
            for name in names["reference_images"]:
                if name.partition(".")[0] in columns:
                    counts += image_counts(_field(batch, name))
            ids = _field(batch, names["id"][0]).to_pylist() if names["id"] else [None] * len(batch)
            named = [
                f"number {self._number(n)}" if id is None else str(id) for n, id in zip(numbers, ids, strict=True)
            ]
            yield named, _field(batch, text).to_pylist(), counts.tolist()

    def stored_ids(self) -> list[str | None]:
        """The values of the id column; None where an id is computed from the images."""
        names = self.mapping.names["id"]
        if not names:
            return [None] * len(self)
        columns: Any = self.dataset.select_columns([names[0].partition(".")[0]])
        return [None if id is None else str(id) for id in _field(columns[:], names[0]).to_pylist()]

    def _number(self, place: int) -> int:
        return place if self.numbers is None else self.numbers[place]

    def cast_column(self, name: str, feature: Any) -> MappedRows:
        """The same rows with images decoded or not, as `feature` says."""
        rows = copy.copy(self)
        image = getattr(feature, "feature", feature)
        rows.decode = bool(image.decode)
        return rows


def image_counts(column: Any) -> np.ndarray:
    """The number of images in every row of an arrow column of images, or of lists of images, also nested."""

    def counts(array: Any) -> np.ndarray:
        types = pa.types
        kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
        if not any(is_kind(array.type) for is_kind in kinds):
            return array.is_valid().to_numpy(zero_copy_only=False).astype(int)
        ends = np.cumsum(pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False))
        sums = np.concatenate([[0], np.cumsum(counts(array.flatten()))])
        return sums[ends] - sums[np.concatenate([[0], ends[:-1]])] if len(ends) else ends.astype(int)

    chunks = getattr(column, "chunks", [column])
    return np.concatenate([counts(chunk) for chunk in chunks]) if chunks else np.zeros(0, dtype=int)


def _field(table: Any, name: str) -> Any:
    """A column of an arrow table, or a field in it; nulls if the field does not exist."""
    root, *fields = name.split(".")
    column = table.column(root)
    for field in fields:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(field) < 0:
            return pa.nulls(len(table))
        column = pc.struct_field(column, field)
    return column


def _decoded(image: dict[str, Any] | None) -> PILImage.Image | None:
    if image is None:
        return None
    return open_image(image["bytes"] if image["bytes"] is not None else image["path"])
