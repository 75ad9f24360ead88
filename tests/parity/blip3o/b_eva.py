"""The EVA-CLIP tower, from the picture's file to the pooled features."""

from __future__ import annotations

import torch
from PIL import Image

from echo4o.modeling.blip3o.conditions_blip3o import eva_pixels
from echo4o.modeling.blip3o.sampling_blip3o import CLIP_MEAN, CLIP_STD

from ..golden import GoldenFile
from ..report import Check
from .golden_set import GoldenSet
from .tolerances import close

PIXELS, PATCHES = 8, 16  # strides of the stored parts of tensors


def golden_pixels(golden: GoldenSet, picture: Image.Image) -> torch.Tensor:
    """(1, 3, side, side) of a picture."""
    side = golden.pipeline.vision_model.config.image_size
    return eva_pixels(picture, side, CLIP_MEAN, CLIP_STD)[None]


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    arguments, tensors = file.json["arguments"], file.tensors
    model = golden.pipeline.vision_model
    check("gen_pooling", f"early_pool2d_{model.config.pooling_stride}", arguments["gen_pooling"])
    sizes = arguments["images"].plain()
    resized = arguments["sizes_after_resize_and_crop"].plain()
    for name in sorted({key.partition(".")[0] for key in tensors}):
        with check.trying(name):
            pixels = golden_pixels(golden, golden.picture(f"img_{name}.png"))
            if name in sizes:
                width, height = golden.picture(f"img_{name}.png").size
                check(f"{name}.size", [width, height], sizes[name])
                side, short = model.config.image_size, min(width, height)
                scaled = [side if n == short else int(side * n / short) for n in (width, height)]
                check(f"{name}.sizes_after_resize_and_crop", scaled, resized[name])
            _check_picture(model, pixels, tensors.under(name), check.of(name))


def _check_picture(model, pixels: torch.Tensor, tensors, check: Check) -> None:
    want = tensors["pixel_values"]
    whole = want.shape == pixels.shape
    close(check, "pixel_values", pixels if whole else pixels[..., ::PIXELS, ::PIXELS], want)
    if "features" not in tensors:
        return
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, n=name: seen.update({n: out}))
        for name, module in [
            ("patch_embed", model.patch_embed),
            *((f"block.{i}", b) for i, b in enumerate(model.blocks)),
        ]
    ]
    features = model(pixels)
    for hook in hooks:
        hook.remove()
    want = tensors["features"]
    close(check, "features", features if want.shape == features.shape else features[:, ::PATCHES], want)
    close(check, "pooled", model.pool(features), tensors["pooled"])
    if "patch_embed" in tensors:
        for name, values in seen.items():
            close(check, name, values[:, ::PATCHES], tensors[name])
