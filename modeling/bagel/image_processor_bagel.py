"""Resizes images and cuts them into patches, as the original code does (tests/parity/golden/f_transforms.json)."""

from dataclasses import dataclass

import torch
from PIL import Image

from ..common.images import resize


@dataclass(frozen=True)
class ImageLimits:
    """Size limits of a resized image, in pixels.

    Args:
        max_size, min_size: largest length of the long edge, smallest length of the short edge. `max_size` takes
            precedence if an image cannot satisfy both.
        stride: both edges become multiples of it.
        max_pixels: largest area; it is divided by the number of images that share it.
    """

    max_size: int
    min_size: int
    stride: int
    max_pixels: int = 14 * 14 * 9 * 1024

    def size(self, width: int, height: int, images: int = 1) -> tuple[int, int]:
        """(width, height) after resizing.

        Two properties of the original are kept, because checkpoints were trained with them: too large an area is
        reduced by the ratio of areas instead of its root, and the short edge can become smaller than `min_size`.
        """

        def scaled(width: int, height: int, scale: float) -> tuple[int, int]:
            width, height = round(width * scale), round(height * scale)
            return nearest_multiple(width), nearest_multiple(height)

        def nearest_multiple(edge: int) -> int:
            return max(self.stride, round(edge / self.stride) * self.stride)

        scale = max(min(self.max_size / max(width, height), 1.0), self.min_size / min(width, height))
        result = scaled(width, height, scale)
        area, allowed = result[0] * result[1], self.max_pixels / images
        if area > allowed:
            result = scaled(*result, allowed / area)
        if max(result) > self.max_size:
            result = scaled(*result, self.max_size / max(result))
        return result

    def resize(self, image: Image.Image, images: int = 1) -> Image.Image:
        """The image resized to `size` (bicubic)."""
        return resize(image, self.size(*image.size, images))


def to_patches(pixels: torch.Tensor, patch: int) -> torch.Tensor:
    """(3, H, W) -> (H/p * W/p, p*p*3), row by row, each patch flattened as (row, column, channel)."""
    channels, height, width = pixels.shape
    blocks = pixels.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)
