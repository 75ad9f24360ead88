"""How an image was generated, stored in its PNG file. `echo4o generate --like` reads it."""

from __future__ import annotations

import hashlib
import io
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echo4o.common import strict_json

if TYPE_CHECKING:
    from PIL.Image import Image

KEYWORD = "echo4o"  # of the PNG text chunk
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ImageMetadata:
    """What one image was generated from. It names no local path.

    Args:
        prompt: the prompt.
        seeds: the seeds of all images of the pipeline call; images of one call are computed together.
        index: the number of this image in the call, from 0.
        settings: the arguments of the pipeline call besides prompt, references and seeds.
        references: SHA-256 of the decoded pixels of each reference image, in order.
        model: a Hub repository, or the name of a folder.
        revision: the commit of the repository, or a fingerprint of the folder.
        adapters: the LoRA adapters with their scales and fingerprints.
        loading: how the model was loaded: dtype, device type, quantization, caches, compilation.
        versions: versions of echo4o, torch and diffusers.
    """

    prompt: str
    seeds: tuple[int, ...]
    index: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    references: tuple[str, ...] = ()
    model: str = ""
    revision: str = ""
    adapters: tuple[dict[str, Any], ...] = ()
    loading: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.seeds[self.index]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seed": self.seed}

    @classmethod
    def from_json(cls, value: Any, place: str) -> ImageMetadata:
        """Check and restore the value of `to_json`. Raises ValueError that names `place`."""
        kinds = {
            "prompt": str, "seeds": list, "index": int, "settings": dict, "references": list,
            "model": str, "revision": str, "adapters": list, "loading": dict, "versions": dict,
        }  # fmt: skip
        if not isinstance(value, dict):
            raise ValueError(f"{place}: the metadata is not a JSON object")
        for name, kind in kinds.items():
            if not isinstance(value.get(name), kind):
                raise ValueError(f"{place}: {name} of the metadata is not a {kind.__name__}")
        seeds, index = value["seeds"], value["index"]
        if not all(isinstance(seed, int) for seed in seeds) or not 0 <= index < len(seeds):
            raise ValueError(f"{place}: the metadata names no seed for image {index}")
        known: dict[str, Any] = {name: tuple(value[name]) if kinds[name] is list else value[name] for name in kinds}
        return cls(**known)


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("echo4o", "torch", "diffusers")}


def pixels_sha256(image: Image) -> str:
    """SHA-256 of the size and the RGB pixels of an image."""
    rgb = image.convert("RGB")
    return hashlib.sha256(f"{rgb.width}x{rgb.height} ".encode() + rgb.tobytes()).hexdigest()


def to_png(image: Image, metadata: ImageMetadata | None) -> bytes:
    """An image as the bytes of a PNG file that contains the metadata; None: without."""
    from PIL.PngImagePlugin import PngInfo

    info = None
    if metadata is not None:
        info = PngInfo()
        info.add_itxt(KEYWORD, strict_json.dumps(metadata.to_json(), ensure_ascii=False))
    stream = io.BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read_metadata(path: Path) -> ImageMetadata:
    """The metadata of a PNG file that echo4o wrote. Raises ValueError, naming the file, if it has none."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text chunks may follow the pixels
            text = image.info.get(KEYWORD)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "it is not a PNG file that can be decoded"
        raise ValueError(f"{path}: {reason}") from error
    if not isinstance(text, str):
        raise ValueError(f"{path}: it has no metadata of echo4o (was it edited, or written with --no-metadata?)")
    try:
        value = strict_json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata is not JSON ({error})") from error
    return ImageMetadata.from_json(value, str(path))


def without_metadata(data: bytes) -> bytes:
    """The bytes of an image file without the chunk of metadata; other files are returned unchanged.

    Keys of judgements hash these bytes, so that metadata changes no key.
    """
    if not data.startswith(_SIGNATURE):
        return data
    kept, position = [_SIGNATURE], len(_SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length
        body = data[position + 8 : end - 4]
        if not (data[position + 4 : position + 8] == b"iTXt" and body.startswith(KEYWORD.encode() + b"\0")):
            kept.append(data[position:end])
        position = end
    return b"".join(kept) + data[position:]


def image_sha256(data: bytes) -> str:
    """SHA-256 of an image file, without the chunk of metadata."""
    return hashlib.sha256(without_metadata(data)).hexdigest()
