"""Images that clients send, opened under limits: a small file can hold an image that fills the memory."""

import base64
import binascii
import io

from PIL import Image

from echo4o.modeling.common.image_files import open_image

FORMATS = ("PNG", "JPEG", "WEBP")


def open_upload(data: bytes, place: str, max_pixels: int) -> Image.Image:
    """Decode an uploaded PNG, JPEG or WebP file to RGB, upright and on white.

    Raises:
        ValueError: naming `place`, for other formats, damaged files and images with too many pixels. Only the header
            is read before the size is known.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = max_pixels
    except Exception:  # whatever a decoder of arbitrary bytes runs into
        raise ValueError(f"{place}: is not an image; send PNG, JPEG or WebP") from None
    if width * height > max_pixels:
        raise ValueError(f"{place}: has {width} x {height} pixels; this server takes {max_pixels} at most")
    try:
        return open_image(data, place)
    except ValueError as error:
        raise ValueError(f"{place}: is a damaged image ({str(error).removeprefix(place).strip(' :')})") from None


def read_data_url(url: object, place: str, max_pixels: int) -> Image.Image:
    """Decode an image in a `data:` URL. Other URLs are not fetched: a client must not make a server open addresses.

    Raises:
        ValueError: naming `place`, for other URLs and for images that cannot be used.
    """
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"{place}: must be a data: URL with the image in base64; this server fetches no addresses")
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{place}: must be data:image/png;base64,... (or jpeg, webp)")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{place}: is not valid base64") from None
    return open_upload(data, place, max_pixels)
