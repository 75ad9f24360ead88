"""Text to image by the public pipeline, from recorded noise; and the two ways of reconstruction."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

from echo4o.modeling.blip3o.conditions_blip3o import square
from echo4o.modeling.blip3o.prompts_blip3o import image_tokens, reconstruction_text

from ..golden import GoldenFile, Record
from ..report import Check
from .golden_set import GoldenSet, caption_of, central_square
from .tolerances import TRAJECTORY, close, same_pixels

PATCHES, VALUES = 16, 8  # strides of the stored part of the pixels


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    negative_noise = None
    file.json["arguments"].note("note")
    for call in file.json["arguments"]["calls"]:
        name = call["name"]
        with check.trying(name):
            tensors = file.tensors.under(name)
            draws = tensors.series("draw")
            check(f"{name}.draws", [list(draw.shape) for draw in draws], call["draws"])
            feature_draws = [draw for draw in draws[:-1] if draw.shape[1] != draws[-1].shape[1]]
            if len(feature_draws) > 1:  # the original keeps the negative features of its first guided call
                negative_noise = feature_draws[1]
            noise = {"latents": draws[-1]}
            if feature_draws:
                noise |= {"feature_latents": feature_draws[0], "negative_feature_latents": negative_noise}
            _check_call(golden, call, noise, tensors, check.of(name))


def _check_call(golden: GoldenSet, call: Record, noise: dict[str, Any], tensors, check: Check) -> None:
    pipe, inputs = golden.pipeline, call["inputs"]
    options = {key: call[key] for key in ("height", "width", "num_inference_steps", "guidance_scale")} | noise
    if len(inputs) == 1 and (caption := caption_of(inputs[0])) is not None:
        check("text_prompt", inputs[0], call["text_prompt"])
        _check_outputs(golden, lambda **more: pipe(caption, **options, **more), call, tensors, check)
    elif len(inputs) == 2:
        _check_reading(golden, call, tensors, check)
        image = golden.picture(inputs[1])
        options["through"] = "language_model"
        _check_outputs(golden, lambda **more: pipe.reconstruct(image, **options, **more), call, tensors, check)
    else:
        file, _, crop = inputs[0].partition(",")
        image = golden.picture(file)
        image = central_square(image) if "central square" in crop else image
        _check_outputs(golden, lambda **more: pipe.reconstruct(image, **options, **more), call, tensors, check)


def _check_outputs(golden: GoldenSet, run, call: Record, tensors, check: Check) -> None:
    """The three outputs of a call, and the negative features that guided it."""
    pipe, negatives = golden.pipeline, []
    decode = type(pipe)._decode

    def keep(features, negative, *rest):
        negatives.append(negative)
        return decode(pipe, features, negative, *rest)

    pipe._decode = keep
    try:
        image = run().images[0]
    finally:
        del pipe._decode
    want = tensors["features"]
    close(check, "features", run(output_type="features").images, want[:1], TRAJECTORY)
    check("features: guided", negatives[0] is not None, len(want) == 2)
    if len(want) == 2:
        close(check, "features: negative", negatives[0], want[1:], TRAJECTORY)
    close(check, "latents", run(output_type="latent").images, tensors["latents"], TRAJECTORY)
    same_pixels(check, "image_uint8", np.asarray(image), tensors["image_uint8"])


def _check_reading(golden: GoldenSet, call: Record, tensors, check: Check) -> None:
    """What the language model reads of a picture beside a prompt."""
    text, name = call["inputs"]
    vision, inputs = golden.pipeline._image_states(square(golden.picture(name)))
    ours = reconstruction_text()
    check("text", ours, text)
    written = re.sub(r"(<\|image_pad\|>)\*(\d+)", lambda m: m[1] * int(m[2]), call["text_prompt"])
    check("text_prompt", ours.replace("<image>", image_tokens(len(vision))), written)
    pixels = inputs["pixel_values"][::PATCHES, ::VALUES]
    close(check, "pixel_values.sub", pixels, tensors["pixel_values.sub"])
    check("image_grid_thw", inputs["image_grid_thw"], tensors["image_grid_thw"])
    close(check, "vision", vision, tensors["vision"])
