"""Pictures in: sizes, pixels and patches exactly as the original prepares them (tests/parity/golden/f_transforms.json)."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 200_000_000  # the largest cameras; a small file with more was made to fill the memory


@dataclass(frozen=True)
class ImageLimits:
    """Bounds of a resized picture, in pixels.

    Args:
        max_size, min_size: longest edge at most, shortest edge at least (the longest wins when both cannot hold).
        stride: both edges become multiples of it.
        max_pixels: bound on the area, divided by the number of pictures that share it.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def size(self, width: int, height: int, pictures: int = 1) -> tuple[int, int]:
        """(width, height) after resizing.

        When the area is too large the original shrinks by the ratio of areas instead of its root, and the final cap on
        the long edge can push the short one under its minimum; checkpoints were trained that way, so both stay.
        """

        def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
            edges = (round(edge * scale) for edge in (width, height))
            return tuple(max(self.stride, round(edge / self.stride) * self.stride) for edge in edges)

        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        result = scaled(width, height, scale)
        area, allowed = result[0] * result[1], self.max_pixels / pictures
        if area > allowed:
            result = scaled(*result, allowed / area)
        if max(result) > self.max_size:
            result = scaled(*result, self.max_size / max(result))
        return result

    def resize(self, image: Image.Image, pictures: int = 1) -> Image.Image:
        """The picture at its bounded size (bicubic)."""
        return image.resize(self.size(*image.size, pictures), Image.Resampling.BICUBIC)


def to_rgb(image: Image.Image, place: str = "image") -> Image.Image:
    """Decode fully and convert to RGB; transparency becomes white.

    Raises ValueError, naming `place`, when the picture does not decode or is no PIL image.
    """
    if not isinstance(image, Image.Image):
        raise ValueError(f"{place} is a {type(image).__name__}; give a PIL.Image (open files with PIL.Image.open).")
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{place} has {width} x {height} pixels; pictures have between 1 and {MAX_PIXELS} in all.")
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
    """RGB picture -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5


def vae_scale_factor(config) -> int:
    """Image pixels per latent pixel, per side, from the configuration of an AutoencoderKL."""
    return 2 ** (len(config.block_out_channels) - 1)


def to_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(3, H, W) -> (H/p * W/p, p*p*3), row by row, each patch flattened as (row, column, channel)."""
    channels, height, width = pixels.shape
    blocks = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8; truncated, not rounded, as the original does."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
