"""Answers: token ids, positions in three axes, vision features, logits and the greedy tokens."""

from __future__ import annotations

import itertools

import torch
from PIL import Image

from echo4o.modeling.blip3o.conditions_blip3o import image_states
from echo4o.modeling.blip3o.prompts_blip3o import user_turn

from ..golden import GoldenFile, Record
from ..report import Check
from .golden_set import GoldenSet
from .tolerances import FORWARD, TRAJECTORY, close

ONE_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PATCHES, VALUES = 3, 8  # strides of the stored part of the pixels


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    for chat in file.json["arguments"]["chats"]:
        with check.trying(chat["name"]):
            _check_chat(golden, chat, file.tensors.under(chat["name"]), check.of(chat["name"]))


def _check_chat(golden: GoldenSet, chat: Record, tensors, check: Check) -> None:
    pipe = golden.pipeline
    before, after = user_turn("\0").split("\0")
    text, images = chat["text"], _images(golden, chat["processed_sizes"], tensors)
    question = text.removeprefix(before).removesuffix(after).removeprefix(ONE_IMAGE * len(images))
    check("text", user_turn(ONE_IMAGE * len(images) + question), text)
    inputs = pipe.chat_inputs(question, images)
    check("input_ids", inputs["input_ids"][0], chat["input_ids"])
    _check_positions(pipe, inputs, tensors, check)
    if images:
        check("image_grid_thw", inputs["image_grid_thw"], tensors["image_grid_thw"])
        close(check, "pixel_values.sub", inputs["pixel_values"][::PATCHES, ::VALUES], tensors["pixel_values.sub"])
        vision = image_states(pipe.language_model, inputs["pixel_values"], inputs["image_grid_thw"])
        close(check, "vision", vision, tensors["vision"])
    new_ids = chat["new_ids"]
    out = pipe.language_model.generate(
        **inputs, max_new_tokens=len(new_ids), do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    logits = torch.cat(out.logits)
    check("new_ids", out.sequences[0, inputs["input_ids"].shape[1] :], new_ids)
    want = tensors["logits"]
    close(check, "logits", logits[: len(want)], want, TRAJECTORY)
    top = logits.topk(2).values
    close(
        check, "min_top1_top2_margin", float((top[:, 0] - top[:, 1]).min()), chat["min_top1_top2_margin"], TRAJECTORY
    )
    check("answer", pipe.chat(question, images or None, max_new_tokens=len(new_ids)), chat["answer"])


def _images(golden: GoldenSet, sizes, tensors) -> list[Image.Image]:
    """The pictures of a chat: those with the processed sizes, and of several such the ones with the recorded pixels."""
    if not sizes:
        return []
    options = [golden.pictures_of_size(size) for size in sizes]
    want, process = tensors["pixel_values.sub"], golden.pipeline.image_processor
    for chosen in itertools.product(*options):
        pictures = [picture for _, picture in chosen]
        pixels = process(images=pictures, return_tensors="pt")["pixel_values"][::PATCHES, ::VALUES]
        if pixels.shape == want.shape and (pixels - want).abs().max() <= FORWARD:
            return pictures
    raise ValueError(f"No pictures of the directory have the processed sizes {sizes} and the recorded pixels.")


def _check_positions(pipe, inputs, tensors, check: Check) -> None:
    ids = inputs["input_ids"]
    if "mm_token_type_ids" in inputs:
        model = pipe.language_model.model
        positions, _ = model.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])
    else:
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    check("position_ids", positions[:, 0], tensors["position_ids"])
