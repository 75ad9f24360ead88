"""Checks the bytes of an image (JPEG, PNG or WebP) by decoding it, or faster by its header and end mark."""

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass
from enum import StrEnum

from PIL import Image, UnidentifiedImageError

from echo4o.dataset_scripts.findings import RejectionReason
from echo4o.modeling.common.image_files import seen_size, upright

_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"RIFF": "WEBP"}
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 64 << 20
MAX_PIXELS = 1 << 25  # 33 million, about 100 MB when decoded; training reads no larger ones either


class ImageVerification(StrEnum):
    """How images are checked: decoded completely, or by header and end mark."""

    full = "full"
    header = "header"


@dataclass(frozen=True)
class CheckedImage:
    """An image after its check. If it is not valid, `reason` and `detail` describe the problem."""

    data: bytes
    sha256: bytes
    format: str = ""
    width: int = 0
    height: int = 0
    reason: RejectionReason | None = None
    detail: str = ""

    def facts(self) -> dict:
        """The facts that the row's metadata contains."""
        return {"format": self.format, "width": self.width, "height": self.height, "bytes": len(self.data)}


def check_image(data: bytes, verify: str = ImageVerification.full, reencode: bool = False) -> CheckedImage:
    """Check the bytes of one image without changing them.

    With `reencode`, an image of another format that Pillow decodes is converted to PNG instead of being rejected.
    """
    digest = hashlib.sha256(data).digest()
    if not data:
        return CheckedImage(data, digest, reason=RejectionReason.TRUNCATED, detail="0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the size is checked below; invalid EXIF is accepted
        try:
            with Image.open(io.BytesIO(data), formats=None if reencode else FORMATS) as image:
                return _check_opened(image, data, digest, verify)
        except Exception as error:  # decoders raise exceptions of any type for bad input
            reason, detail = _explain(error, data)
            return CheckedImage(data, digest, reason=reason, detail=detail)


def _check_opened(image: Image.Image, data: bytes, digest: bytes, verify: str) -> CheckedImage:
    name = "JPEG" if image.format == "MPO" else image.format or ""
    if image.width * image.height > MAX_PIXELS:
        detail = f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded"
        return CheckedImage(
            data, digest, name, *seen_size(image), reason=RejectionReason.DECOMPRESSION_BOMB, detail=detail
        )
    if name not in FORMATS:
        return _as_png(image)
    if cut := _cut_short(name, data):
        return CheckedImage(data, digest, name, *seen_size(image), reason=RejectionReason.TRUNCATED, detail=cut)
    if verify == ImageVerification.full:
        image.load()  # before anything else reads the image: Pillow reports damage once
    return CheckedImage(data, digest, name, *seen_size(image))


def _as_png(image: Image.Image) -> CheckedImage:
    stream = io.BytesIO()
    image = upright(image)
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):  # which PNG cannot hold
        image = image.convert("RGB")
    image.save(stream, "PNG")
    data = stream.getvalue()
    return CheckedImage(data, hashlib.sha256(data).digest(), "PNG", *image.size)


def _cut_short(name: str, data: bytes) -> str:
    """A sign, found without decoding, that the end of the file is missing; otherwise \"\"."""
    if name == "JPEG" and b"\xff\xd9" not in data[-4096:]:
        return "no end-of-image mark"
    if name == "PNG" and b"IEND" not in data[-4096:]:
        return "no IEND chunk"
    if name == "WEBP":
        declared = struct.unpack("<I", data[4:8].ljust(4, b"\xff"))[0] + 8
        return f"{len(data):,} bytes of {declared:,}" if declared > len(data) else ""
    return ""


def _explain(error: Exception, data: bytes) -> tuple[RejectionReason, str]:
    text = f"{type(error).__name__}: {str(error) or 'no detail'}"[:200]
    if isinstance(error, Image.DecompressionBombError) or "Decompressed data too large" in text or "MAX_TEXT" in text:
        return RejectionReason.DECOMPRESSION_BOMB, text
    kind = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "")
    if cut := _cut_short(kind, data):
        return RejectionReason.TRUNCATED, cut
    if isinstance(error, UnidentifiedImageError) and not kind:
        return (
            RejectionReason.UNDECODABLE,
            f"not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; it begins with {data[:8]!r}",
        )
    return (RejectionReason.TRUNCATED if "truncated" in text.lower() else RejectionReason.UNDECODABLE), text
