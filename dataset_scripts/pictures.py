"""Checks a picture's bytes: a sound JPEG, PNG or WebP, decoded fully or (the fast way) by header and end mark."""

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass
from enum import StrEnum

from PIL import Image, UnidentifiedImageError

from echo4o.dataset_scripts.findings import Reason

_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"RIFF": "WEBP"}
FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PICTURE_BYTES = 64 << 20
MAX_PIXELS = 1 << 25  # 33 million, about 100 MB when decoded


class Verify(StrEnum):
    """How pictures are checked."""

    full = "full"
    header = "header"


@dataclass(frozen=True)
class Picture:
    """What is known of a picture after its check; `reason` and `detail` say what is wrong, if anything."""

    data: bytes
    sha256: bytes
    format: str = ""
    width: int = 0
    height: int = 0
    reason: Reason | None = None
    detail: str = ""

    def facts(self) -> dict:
        """What a row's metadata keeps of it."""
        return {"format": self.format, "width": self.width, "height": self.height, "bytes": len(self.data)}


def check_picture(data: bytes, verify: str = Verify.full, reencode: bool = False) -> Picture:
    """Check the bytes of one picture; they are kept as they are.

    With `reencode`, a picture of another format that Pillow decodes is stored as PNG instead of being refused.
    """
    digest = hashlib.sha256(data).digest()
    if not data:
        return Picture(data, digest, reason=Reason.TRUNCATED, detail="0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's bomb warning comes before ours; odd EXIF is no fault
        try:
            with Image.open(io.BytesIO(data), formats=None if reencode else FORMATS) as image:
                return _check_opened(image, data, digest, verify)
        except Exception as error:  # decoders raise whatever their format's parser meets: all of it is bad input
            reason, detail = _explain(error, data)
            return Picture(data, digest, reason=reason, detail=detail)


def _check_opened(image: Image.Image, data: bytes, digest: bytes, verify: str) -> Picture:
    name = "JPEG" if image.format == "MPO" else image.format
    facts = (data, digest, name, *image.size)
    if image.width * image.height > MAX_PIXELS:
        detail = f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded"
        return Picture(*facts, reason=Reason.DECOMPRESSION_BOMB, detail=detail)
    if name not in FORMATS:
        return _as_png(image)
    if cut := _cut_short(name, data):
        return Picture(*facts, reason=Reason.TRUNCATED, detail=cut)
    if verify == Verify.full:
        image.load()
    return Picture(*facts)


def _as_png(image: Image.Image) -> Picture:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    data = stream.getvalue()
    return Picture(data, hashlib.sha256(data).digest(), "PNG", *image.size)


def _cut_short(name: str, data: bytes) -> str:
    """What shows, without decoding, that the end of the file is missing; empty if nothing does."""
    if name == "JPEG" and b"\xff\xd9" not in data[-4096:]:
        return "no end-of-image mark"
    if name == "PNG" and b"IEND" not in data[-4096:]:
        return "no IEND chunk"
    if name == "WEBP":
        whole = struct.unpack("<I", data[4:8].ljust(4, b"\xff"))[0] + 8
        return f"{len(data):,} bytes of {whole:,}" if whole > len(data) else ""
    return ""


def _explain(error: Exception, data: bytes) -> tuple[Reason, str]:
    text = f"{type(error).__name__}: {str(error) or 'no detail'}"[:200]
    if isinstance(error, Image.DecompressionBombError) or "Decompressed data too large" in text or "MAX_TEXT" in text:
        return Reason.DECOMPRESSION_BOMB, text
    kind = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "")
    if cut := _cut_short(kind, data):
        return Reason.TRUNCATED, cut
    if isinstance(error, UnidentifiedImageError) and not kind:
        return Reason.UNDECODABLE, f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; it begins with {data[:8]!r}"
    return (Reason.TRUNCATED if "truncated" in text.lower() else Reason.UNDECODABLE), text
