"""PIL images to pixel tensors and back."""

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 200_000_000  # the largest cameras have fewer; a small file with more was made to fill the memory


def to_rgb(image: Image.Image, place: str = "image") -> Image.Image:
    """Decode fully and convert to RGB; transparency becomes white.

    Raises ValueError, naming `place`, if the image does not decode or is not a PIL image.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{place} is a {type(image).__name__}; give a PIL.Image (open files with PIL.Image.open).")
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{place} has {width} x {height} pixels; images have between 1 and {MAX_PIXELS} in all.")
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        raise ValueError(f"{place} has mode {image.mode!r}, whose range is unknown; convert it to 8 bits first.")
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, AssertionError, Image.DecompressionBombError) as error:
        raise ValueError(f"{place} does not decode: {error or type(error).__name__}") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8; truncated, not rounded, as the original does."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
