"""Answers, the features of a question, and an answer that asks for an image."""

from __future__ import annotations

import torch

from echo4o.modeling.omnigen2.image_processor_omnigen2 import rounded_uint8
from echo4o.modeling.omnigen2.prompts_omnigen2 import IMAGE_TOKEN, chat_text

from ..golden import GoldenFile
from ..report import SINGLE, TRAJECTORY, Check
from .calls import Recorder
from .comparing import compare_images
from .golden_set import GoldenSet

LOGITS = 3e-4  # several passes through the language model


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    for name, case in file.json["cases"].items():
        with check.trying(name):
            tensors, own = file.tensors.under(name), check.of(name)
            _check_answer(golden, case, tensors, own)
            if "steps" in case:
                _check_image(golden, case, tensors, own)


def _check_answer(golden, case, tensors, check) -> None:
    pipe, prompt = golden.pipe, case["prompt"]
    images = [golden.reference(index) for index in case["refs"] or ()]
    text = chat_text(prompt, len(images))
    check("chat_text", text, case["chat_text"])
    inputs = pipe.chat_inputs(prompt, images)
    check("ids", inputs["input_ids"][0].tolist(), case["ids"])
    if images:
        _check_images(pipe, inputs, tensors, check)
        features = pipe.chat_features(prompt, images)
        check("embeds", features, tensors["embeds_without_image_tokens"], SINGLE)
        case.note("embeds")
    answer = pipe.mllm.generate(
        **inputs,
        max_new_tokens=256,
        do_sample=False,
        eos_token_id=pipe.end_token_ids(),
        output_logits=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = answer.sequences[0, inputs["input_ids"].shape[1] :]
    check("tokens", tokens, tensors["tokens"])
    check("raw_answer", pipe.tokenizer.decode(tokens), case["raw_answer"])
    check("answer", pipe.chat(prompt, image=images or None), case["answer"])
    first = tensors["logits_first4"]
    check("logits_first4", torch.cat(answer.logits[: len(first)]), first, LOGITS)
    scores = torch.cat(answer.scores).topk(2).values
    margins = scores[:, 0] - scores[:, 1]
    check("margin", margins, tensors["margin"], LOGITS)
    check("min_margin", margins.min(), case["min_margin"], LOGITS)


def _check_images(pipe, inputs, tensors, check) -> None:
    check("image_grid_thw", inputs["image_grid_thw"], tensors["image_grid_thw"])
    check("pixel_values", inputs["pixel_values"], tensors["pixel_values"], SINGLE)
    vision = pipe.mllm.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    vision = getattr(vision, "pooler_output", vision)
    check("vision_embeds", torch.cat(list(vision)), tensors["vision_embeds"], SINGLE)
    positions = pipe.mllm.model.get_rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        attention_mask=inputs["attention_mask"],
    )
    check("mllm_position_ids", positions[0], tensors["mllm_position_ids"])
    count = int((inputs["input_ids"] == pipe.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)).sum())
    check("image tokens", count, len(tensors["vision_embeds"]))


def _check_image(golden, case, tensors, check) -> None:
    pipe = golden.pipe
    check("text", case["answer"], case["text"])
    check("negative_text", chat_text(""), case["negative_text"])
    check("embeds", pipe.chat_features(case["prompt"], []), tensors["embeds"], SINGLE)
    check("negative_embeds", pipe.chat_features("", []), tensors["negative_embeds"], SINGLE)
    height, width = case["hw"]
    steps = tensors.series("latents")
    check("updates", case["steps"], len(steps))
    with Recorder(pipe, list(tensors["noise"])) as recorder:
        result = pipe.respond(
            case["prompt"],
            height=height,
            width=width,
            num_inference_steps=case["steps"],
            guidance_scale=case["text_guidance_scale"],
            callback_on_step_end=recorder.on_step_end,
        )
    check("answer given", result.texts, [case["answer"]])
    check("updates made", len(recorder.latents), len(steps))
    for step, (got, want) in enumerate(zip(recorder.latents, steps, strict=False)):
        check(f"latents.{step}", torch.stack(got), want, TRAJECTORY)
    compare_images(check, "uint8", result.images[0], tensors["uint8"])
    compare_images(check, "decoded", rounded_uint8(recorder.decoded[0]), tensors["uint8"])
