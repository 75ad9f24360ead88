"""Sizes of reference images and of generated images, and images to pixels and back."""

import math

import numpy as np
import torch
from PIL import Image

from ..common.images import resize, to_pixels


def reference_size(width: int, height: int, max_pixels: int, max_side: int, stride: int) -> tuple[int, int]:
    """(height, width) that a reference of this size is resized to; never larger. A side can become 0."""
    ratio = min(math.sqrt(max_pixels / (height * width)), max_side / max(height, width), 1)
    return int(height * ratio) // stride * stride, int(width * ratio) // stride * stride


def reference_pixels(
    image: Image.Image, max_pixels: int, max_side: int, stride: int, place: str = "image"
) -> torch.Tensor:
    """An RGB image as (3, H, W) float32 in [-1, 1], resized to [`reference_size`].

    Raises ValueError, naming `place`, for an image that is too small.
    """
    height, width = reference_size(*image.size, max_pixels, max_side, stride)
    if not height or not width:
        raise ValueError(
            f"{place} has {image.width} x {image.height} pixels; after resizing to at most {max_pixels} pixels, both "
            f"sides must be {stride} at least."
        )
    return to_pixels(resize(image, (width, height), Image.Resampling.LANCZOS))


def generated_size(height: int, width: int, max_pixels: int, stride: int) -> tuple[int, int]:
    """(height, width) at which an image of the requested size is generated, before it is brought to that size."""
    ratio = min(math.sqrt(max_pixels / (height * width)), 1)
    return int(height * ratio) // stride * stride, int(width * ratio) // stride * stride


def to_size(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(3, H, W) -> (3, height, width), bilinear without antialiasing; unchanged if it has this size."""
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels
    return torch.nn.functional.interpolate(pixels[None], size=(height, width), mode="bilinear", align_corners=False)[0]


def rounded_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8, rounded to the nearest value."""
    unit = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).round().permute(1, 2, 0).to(torch.uint8).cpu().numpy()
