"""What the pipelines share at the end of an update and of a call: callbacks, and images in the form asked for."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from PIL import Image


def callback_tensors(callback: Any, names: Sequence[str] | None, known: list[str]) -> list[str]:
    """Names of the tensors that a callback receives.

    Args:
        callback: `callback_on_step_end`: a function or a callback of diffusers; None: there is none.
        names: `callback_on_step_end_tensor_inputs`; None: all of `known`.

    Raises ValueError if the callback is not a function, or for an unknown name.
    """
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end is a {type(callback).__name__}; give a function.")
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}; known are {known}.")
    return known if names is None else list(names)


def stack_equal(items: list) -> Any:
    """One array or tensor if all items have the same shape, else the list."""
    if any(item.shape != items[0].shape for item in items):
        return items
    return np.stack(items) if isinstance(items[0], np.ndarray) else torch.stack(items)


def images_as(output_type: str, pixels: list[torch.Tensor], to_uint8: Callable[[torch.Tensor], np.ndarray]) -> Any:
    """Decoded images as `output_type` asks.

    Args:
        output_type: "pil", "np" for arrays (H, W, 3) in [0, 1], or "pt" for tensors (3, H, W) in [0, 1].
        pixels: (3, H, W) in about [-1, 1] each.
        to_uint8: how the model's original rounds pixels to (H, W, 3) uint8.

    Returns:
        a list, or for "np" and "pt" one array or tensor if all images have the same size.
    """
    if output_type == "pil":
        return [Image.fromarray(to_uint8(p)) for p in pixels]
    unit = [(p.float() * 0.5 + 0.5).clamp(0, 1) for p in pixels]
    return stack_equal(unit if output_type == "pt" else [p.permute(1, 2, 0).cpu().numpy() for p in unit])
