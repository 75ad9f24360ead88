"""Runs the frozen language model with the learned queries behind a text: their last hidden states condition the head.

Texts of a batch are padded on the right. Attention is causal, so no token attends to padding and every row equals a
run of its own; the mask that other paddings need is not needed. The positions of every row start at 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..common.images import resize

IMAGE_SIDE = 448  # pixels; images beside a generation prompt have this size, whatever their aspect ratio


def embed_tokens(language_model, ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Input embeddings of token ids, wherever offloading has put the table."""
    table = language_model.get_input_embeddings()
    place = device if table.weight.is_meta else table.weight.device
    return table(ids.to(place)).to(device)


def query_states(
    language_model,
    ids: Sequence[Sequence[int]],
    queries: torch.Tensor,
    pad_id: int,
    images: dict[int, torch.Tensor] | None = None,
    image_pad_id: int | None = None,
) -> torch.Tensor:
    """States of the queries behind each text, after the language model's final norm.

    Args:
        language_model: `Qwen2_5_VLForConditionalGeneration`.
        ids: token ids of each row, up to and including `[IMG]`.
        queries: (1, K, hidden) learned input embeddings; their device is the one that computes.
        images: row -> (T, hidden) embeddings for the row's `image_pad_id` tokens.

    Returns:
        (B, K, hidden).
    """
    count, device = queries.shape[1], queries.device
    lengths = [len(row) for row in ids]
    padded = torch.full((len(ids), max(lengths) + count), pad_id)
    for row, values in enumerate(ids):
        padded[row, : len(values)] = torch.tensor(values)
    embeds = embed_tokens(language_model, padded, device)
    for row, tokens in (images or {}).items():
        embeds[row, (padded[row] == image_pad_id).to(device)] = tokens.to(embeds)
    places = torch.tensor(lengths, device=device)[:, None] + torch.arange(count, device=device)  # (B, K)
    index = places[..., None].expand(-1, -1, embeds.shape[-1])
    # Not in place: the queries may need a gradient.
    embeds = embeds.scatter(1, index, queries.to(embeds.dtype).expand(len(ids), -1, -1))
    positions = torch.arange(embeds.shape[1], device=device).expand(3, len(ids), -1)
    out = language_model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False)
    return out.last_hidden_state.gather(1, index)


def image_states(language_model, pixel_values: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Qwen's vision features of images, (T, hidden): the embeddings of their placeholder tokens."""
    features = language_model.model.get_image_features(pixel_values, grid, return_dict=True).pooler_output
    return torch.cat(list(features)) if isinstance(features, (list, tuple)) else features


def square(image: Image.Image) -> Image.Image:
    """The image in the size that images beside a generation prompt have; the aspect ratio is not kept."""
    return resize(image, (IMAGE_SIDE, IMAGE_SIDE))


def central_crop(image: Image.Image, side: int) -> Image.Image:
    """The centre of an image whose shorter side is resized to `side` (bicubic); the longer one is rounded down."""
    short = min(image.size)
    width, height = (side if n == short else int(side * n / short) for n in image.size)
    image = resize(image, (width, height))
    left, top = int(round((width - side) / 2)), int(round((height - side) / 2))
    return image.crop((left, top, left + side, top + side))


def eva_pixels(image: Image.Image, side: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """An image as the EVA-CLIP tower reads it: (3, side, side) float32 of its centre."""
    pixels = torch.from_numpy(np.array(central_crop(image.convert("RGB"), side))).permute(2, 0, 1)
    means, stds = (torch.tensor(x)[:, None, None] for x in (mean, std))
    return (pixels.float() / 255 - means) / stds


def onload(module: nn.Module) -> None:
    """Move a component to the device that computes, where model offloading keeps it elsewhere.

    Offloading moves a component when it is called; parts of the language model are called on their own here.
    """
    hook: Any = getattr(module, "_hf_hook", None)  # accelerate 1.15
    if type(hook).__name__ == "CpuOffload":
        hook.pre_forward(module)
