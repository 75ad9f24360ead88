"""PIL images to pixel tensors and back."""

from collections.abc import Sequence
from typing import Any

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


def to_images(value, place: str = "image") -> list[Image.Image]:
    """PIL images from an array or a tensor in the form that pipelines of diffusers return.

    Args:
        value: an array (H, W), (H, W, C) or (B, H, W, C), or a tensor (H, W), (C, H, W) or (B, C, H, W); C is 1, 3 or
            4. Floating values are in [0, 1], others are of uint8.

    Raises ValueError, naming `place`, for other shapes, types and values.
    """
    is_tensor = isinstance(value, torch.Tensor)
    array = value.detach().cpu().float().numpy() if is_tensor and value.is_floating_point() else np.asarray(value)
    if is_tensor and array.ndim in (3, 4):
        array = np.moveaxis(array, -3, -1)
    wanted = "(C, H, W) or (B, C, H, W)" if is_tensor else "(H, W, C) or (B, H, W, C)"
    if array.ndim not in (2, 3, 4) or (array.ndim > 2 and array.shape[-1] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"{place} is of shape {tuple(value.shape)}; give {wanted} with 1, 3 or 4 channels.")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"{place} has values outside [0, 1] (or not finite): floating images are in [0, 1].")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{place} is of type {array.dtype}; give uint8, or floating values in [0, 1].")
    images = array if array.ndim == 4 else [array]
    return [Image.fromarray(a[..., 0] if a.ndim == 3 and a.shape[-1] == 1 else a) for a in images]


def qwen_vision_inputs(processor: Any, images: Sequence[Image.Image]) -> Any:
    """The inputs of Qwen's vision model for RGB images: `pixel_values` and `image_grid_thw`.

    The images are resized before the processor of transformers sees them, by its own rule of sizes, so that the
    pixels do not depend on the version of Pillow ([`resize`]).
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    factor = processor.patch_size * processor.merge_size
    limits = {"min_pixels": processor.size["shortest_edge"], "max_pixels": processor.size["longest_edge"]}
    resized = []
    for image in images:
        height, width = smart_resize(image.height, image.width, factor=factor, **limits)
        resized.append(resize(image, (width, height), processor.resample))
    return processor(images=resized, return_tensors="pt")


def to_pixels(image: Image.Image) -> torch.Tensor:
    """RGB image -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (pixels.float() / 255 - 0.5) / 0.5


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8; truncated, not rounded, as the original does."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).to(torch.uint8).cpu().numpy()
