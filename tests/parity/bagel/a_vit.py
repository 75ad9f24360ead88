"""Vision tower, connector and position table, from the picture's file on."""

from __future__ import annotations

import torch

from echo4o.modeling.bagel.image_processor_bagel import ImageLimits, to_patches
from echo4o.modeling.bagel.segments_bagel import grid_position_ids
from echo4o.modeling.common.image_files import to_rgb
from echo4o.modeling.common.images import to_pixels

from ..golden import GoldenFile, Record
from ..report import SINGLE, Check
from .golden_set import GoldenSet


def limits(transforms: Record, name: str) -> ImageLimits:
    """`vae_transform` or `vit_transform` as this golden file used it."""
    transform = transforms[name]
    more = {"max_pixels": transform["max_pixels"]} if "max_pixels" in transform else {}
    return ImageLimits(*(transform[key] for key in ("max_image_size", "min_image_size", "image_stride")), **more)


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    transforms = file.json["transforms"]
    transforms.note("vae_transform")
    for name, case in file.json["cases"].items():
        with check.trying(name):
            _check_case(golden, limits(transforms, "vit_transform"), case, file.tensors.under(name), check.of(name))


def _check_case(golden, vit, case, tensors, check) -> None:
    model = golden.components["vision_model"]
    pixels = [to_pixels(vit.resize(to_rgb(golden.picture(name)))) for name in case["images"]]
    check("pixel_shapes", [list(x.shape) for x in pixels], case["pixel_shapes"])
    for index, want in enumerate(tensors.series("pixels")):
        check(f"pixels.{index}", pixels[index], want, SINGLE)
    patches = [to_patches(x, vit.stride) for x in pixels]
    side = model.config.max_patches_per_side
    position_ids = torch.cat(
        [grid_position_ids((x.shape[1] // vit.stride, x.shape[2] // vit.stride), side) for x in pixels]
    )
    lengths = [len(x) for x in patches]
    check("patches", torch.cat(patches), tensors["patches"], SINGLE)
    check("position_ids", position_ids, tensors["position_ids"])
    check("seqlens", lengths, tensors["seqlens"])
    # From the golden patches on, so that each row blames one step.
    with torch.no_grad():
        out = model(tensors["patches"], position_ids, lengths)
    check("vit_out", out.last_hidden_state, tensors["vit_out"], SINGLE)
    check("connector_out", out.connected, tensors["connector_out"], SINGLE)
    check("llm_in", out.embeds, tensors["llm_in"], SINGLE)
