"""Opening images, by one rule everywhere: orientation, transparency, bit depth, size. Needs Pillow and numpy only."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # from here on Pillow refuses to open a file: a small one was made to fill the memory
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, AssertionError, struct.error, Image.DecompressionBombError)


def open_image(source: str | Path | bytes, place: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open and decode an image file, or the bytes of one, as [`to_rgb`] does. Raises ValueError naming `place`."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return to_rgb(image, place, max_pixels)
    except _DECODING_ERRORS as error:
        if isinstance(error, ValueError) and str(error).startswith(place):
            raise
        raise ValueError(f"{place} does not decode: {error or type(error).__name__}") from error


def to_rgb(image: Image.Image, place: str = "image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as people see it, in RGB: decoded, upright, on white where it is transparent.

    The orientation in the EXIF data is applied. 16-bit grey values are scaled to 8 bits.

    Raises ValueError, naming `place`, if the image does not decode, is too large, or is not a PIL image.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{place} is a {type(image).__name__}; give a PIL.Image (open files with PIL.Image.open).")
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise ValueError(f"{place} has {width} x {height} pixels; images have between 1 and {max_pixels} in all.")
    if image.mode in ("F", "I"):
        raise ValueError(f"{place} has mode {image.mode!r}, whose range is unknown; convert it to 8 bits first.")
    try:
        image.load()
    except _DECODING_ERRORS as error:
        raise ValueError(f"{place} does not decode: {error or type(error).__name__}") from error
    image = upright(image)
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)  # 0 to 65535
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def seen_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image after its EXIF orientation is applied, without decoding it.

    A PNG can have EXIF data behind its pixels; it is seen only if the image was decoded before.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return image.size  # getexif() would decode the image, and the error of a damaged one would be lost
    try:
        is_turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
    except (*_DECODING_ERRORS, TypeError, KeyError):
        is_turned = False
    width, height = image.size
    return (height, width) if is_turned else (width, height)


def is_plain(image: Image.Image) -> bool:
    """Whether an opened image has nothing that [`to_rgb`] changes: it is upright, opaque and of 8 bits."""
    return image.mode in ("RGB", "L") and "transparency" not in image.info and not _is_oriented(image)


def _is_oriented(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) != 1
    except (*_DECODING_ERRORS, TypeError, KeyError):
        return False


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied; unreadable EXIF data counts as none."""
    try:
        return ImageOps.exif_transpose(image)
    except (*_DECODING_ERRORS, TypeError, KeyError):
        return image
