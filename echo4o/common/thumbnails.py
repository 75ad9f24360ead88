"""Images inside HTML pages, as data URIs: a report is one file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL.Image import Image


def data_uri(data: bytes, kind: str) -> str:
    """The bytes of an image as a `data:` address. `kind`: png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png_uri(image: Image) -> str:
    """An image as a `data:` address, unchanged."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return data_uri(stream.getvalue(), "png")


def figure_uri(figure, dpi: int) -> str:
    """A matplotlib figure as a `data:` address of a PNG image."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi)
    return data_uri(stream.getvalue(), "png")


def thumbnail_uri(source: Path | bytes, side: int) -> str:
    """A small JPEG of an image, at most `side` pixels wide and high, as a `data:` address.

    Raises OSError if the image cannot be read.
    """
    stream = io.BytesIO()
    thumbnail(io.BytesIO(source) if isinstance(source, bytes) else source, side).save(stream, "JPEG", quality=85)
    return data_uri(stream.getvalue(), "jpeg")


def thumbnail(source: Path | BinaryIO, side: int) -> Image:
    """A small RGB copy of an image, at most `side` pixels wide and high. Raises OSError if it cannot be read."""
    from PIL import Image

    with Image.open(source) as image:
        image.draft("RGB", (side, side))  # a JPEG is decoded at a smaller size, which is faster
        small = image.convert("RGB")
    small.thumbnail((side, side))
    return small
