"""Pictures in: sizes, pixels and patches exactly as the original prepares them (tests/parity/golden/f_transforms.json)."""

from dataclasses import dataclass

import torch
from PIL import Image

from ..common.images import resize


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
        return resize(image, self.size(*image.size, pictures))


def to_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(3, H, W) -> (H/p * W/p, p*p*3), row by row, each patch flattened as (row, column, channel)."""
    channels, height, width = pixels.shape
    blocks = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)
