"""Images inside HTML pages, as data URIs: a report is one file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

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


def thumbnail_uri(image: Image, side: int) -> str:
    """A small JPEG of an RGB image, at most `side` pixels wide and high, as a `data:` address."""
    stream = io.BytesIO()
    thumbnail(image, side).save(stream, "JPEG", quality=85)
    return data_uri(stream.getvalue(), "jpeg")


def thumbnail(image: Image, side: int) -> Image:
    """A small copy of an image, at most `side` pixels wide and high."""
    small = image.copy()
    small.thumbnail((side, side))
    return small
