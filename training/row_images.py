"""Images of rows as training reads them: by the rules of `echo4o dataset build` and `validate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from echo4o.dataset_scripts.images import MAX_PIXELS, ImageVerification, check_image
from echo4o.dataset_scripts.row_groups import RowGroups
from echo4o.modeling.common.image_files import open_image, to_rgb
from echo4o.training.backbones.base import WrappedPreparation
from echo4o.training.columns import MappedRows


class UnreadableImage(ValueError):
    """An image of a row that is not there, or that does not decode."""


class DecodedRows(WrappedPreparation):
    """Decodes the images of rows before a backbone prepares them. Use it with [`undecoded`] datasets."""

    def prepare(self, rows: Sequence[dict]) -> Sequence[Any]:
        return self.source.prepare([decoded(row) for row in rows])


def is_mapped(dataset: Any) -> bool:
    """Whether the rows are those of `data.columns`, whose images may be of any format."""
    return isinstance(dataset, MappedRows) or (isinstance(dataset, RowGroups) and dataset.is_mapped)


def undecoded(dataset: Any) -> Any:
    """The dataset with its images as bytes; a stream that does not know its columns stays as it is."""
    raw = {"reference_images": datasets.List(datasets.Image(decode=False)), "image": datasets.Image(decode=False)}
    for name in raw.keys() & set(dataset.column_names or ()):
        dataset = dataset.cast_column(name, raw[name])
    return dataset


def decoded(row: dict) -> dict:
    """The row with its images in RGB. Raises UnreadableImage for an image that `echo4o dataset validate` refuses."""
    references = [_decode(stored, row["id"]) for stored in row["reference_images"] or []]
    return row | {"image": _decode(row.get("image"), row["id"]), "reference_images": references}


def image_bytes(stored: dict, row: str) -> bytes:
    """The bytes of an undecoded image."""
    if stored.get("bytes") is not None:
        return stored["bytes"]
    try:
        return Path(stored["path"]).read_bytes()
    except (OSError, TypeError) as error:
        raise UnreadableImage(f"row {row}: an image cannot be read: {error}") from error


def _decode(stored: dict | Image.Image | None, row: str) -> Image.Image | None:
    place = f"an image of {row}"
    if isinstance(stored, dict) and "://" in str(stored.get("path")) and stored.get("bytes") is None:
        stored = datasets.Image().decode_example(stored)  # a file that is streamed
    if stored is None:
        return None
    if isinstance(stored, Image.Image):
        return to_rgb(stored, place, MAX_PIXELS)
    data = image_bytes(stored, row)
    checked = check_image(data, ImageVerification.header)  # decoding, which follows, is the rest of the full check
    if checked.reason:
        hint = ""
        if check_image(data, reencode=True).reason is None:
            hint = "; convert it, or name the columns in data.columns, which reads images of all formats"
        raise UnreadableImage(f"{place} is refused ({checked.reason}): {checked.detail}{hint}")
    return open_image(data, place, MAX_PIXELS)
