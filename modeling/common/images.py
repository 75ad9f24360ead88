"""PIL images to pixel tensors and back."""

import numpy as np
import torch
from PIL import Image


def vae_scale_factor(config) -> int:
    """Image pixels per latent pixel, per side, from the configuration of an AutoencoderKL."""
    return 2 ** (len(config.block_out_channels) - 1)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8; truncated, not rounded, as the original does."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
