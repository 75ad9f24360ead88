"""PIL images to pixel tensors and back."""

import numpy as np
import torch
from PIL import Image


def vae_scale_factor(config) -> int:
    """Image pixels per latent pixel, per side, from the configuration of an AutoencoderKL."""
    return 2 ** (len(config.block_out_channels) - 1)


def resize(image: Image.Image, size: tuple[int, int], resample=Image.Resampling.BICUBIC) -> Image.Image:
    """Resizes to (width, height) with the same pixels in every version of Pillow.

    Resampling works in two passes that each round to 8 bits. Pillow 13 begins with the vertical pass where the height
    shrinks much more than the width; earlier versions always begin with the horizontal one. This is the rule of 13.
    """
    lost_columns, lost_rows = image.width - size[0], image.height - size[1]
    vertical_first = lost_rows > 0 and lost_rows > 2 * lost_columns
    between = (image.width, size[1]) if vertical_first else (size[0], image.height)
    return image.resize(between, resample).resize(size, resample)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8; truncated, not rounded, as the original does."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
