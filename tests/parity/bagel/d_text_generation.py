"""Greedy text: every token and its logits, in chat, in the inferencer's understanding and thinking, and on its own."""

from __future__ import annotations

from dataclasses import replace

import torch

from echo4o.modeling.bagel.text_generation_bagel import generate_text
from echo4o.modeling.common.image_files import to_rgb

from ..golden import GoldenFile, Record, Tensors
from ..report import SINGLE, Check
from .golden_set import GoldenSet
from .recorder import Recorder, build_pipeline, check_prefills


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    for name, case in file.json["cases"].items():
        with check.trying(name):
            pipe = build_pipeline(golden, file.json["transforms"])
            _check_case(golden, pipe, case, file.tensors.under(name), check.of(name))


def _check_case(golden: GoldenSet, pipe, case: Record, tensors: Tensors, check: Check) -> None:
    """Generate twice: `max_length` of the original counts the start token and drops the last token that it chose, so
    that as many new tokens give the same logits, and one fewer gives the same text."""
    ask = _asker(golden, pipe, case)
    with Recorder(pipe) as recorder:
        ask(case["max_length"])
    logits = torch.stack(recorder.logits)
    check("tokens", torch.tensor(recorder.fed)[:, None], tensors["tokens"])
    check("tokens of the json", recorder.fed, case["tokens"])
    check("logits", logits, tensors["logits"], SINGLE)
    best = logits.topk(2).values
    check("min_top1_top2_margin", (best[:, 0] - best[:, 1]).min(), case["min_top1_top2_margin"], SINGLE)
    length, position = recorder.generation_start
    check("kv_len", length, case["kv_len"])
    check("start_position", position, case["start_position"])
    if "system_prompt" in case:
        prompts = pipe.config.think_prompts
        check("system_prompt", prompts["text" if "understanding" in case["via"] else "image"], case["system_prompt"])

    with Recorder(pipe) as recorder:
        answer = ask(case["max_length"] - 1)
    want = case["output"]
    check("output", answer, want[0] if isinstance(want, list) else want)
    ids = pipe.tokenizer.encode(answer, add_special_tokens=False)
    check("reencoded_output_ids", ids, case["reencoded_output_ids"])
    with check.trying("prefill_calls"):
        calls = case["prefill_calls_in_order"]
        if calls:  # none were recorded where the original's functions were called one by one
            check_prefills(recorder.reads, calls, check.of("prefill_calls"))


def _asker(golden: GoldenSet, pipe, case: Record):
    """A function from a number of new tokens to the text, by the way that the case went (its `via`)."""
    via, text = case["via"], case["text"]
    pictures = [golden.picture(name) for name in case.get("images", [])]
    if "end_token_id" in case or "generate_text" in via:
        return lambda count: _generate_alone(pipe, text, case.get("end_token_id", -1), count)
    if "interleave_inference" not in via:  # chat: the ViT sees the picture as it is
        return lambda count: pipe.chat(text, image=pictures or None, max_new_tokens=count)
    think = "think=True" in via
    if "understanding_output=True" in via:
        if think:
            return lambda count: pipe.chat(text, image=pictures or None, think=True, max_new_tokens=count)
        # The inferencer brings pictures to a size for the VAE first.
        resized = [pipe.vae_limits.resize(to_rgb(picture)) for picture in pictures]
        return lambda count: pipe.chat(text, image=resized or None, max_new_tokens=count)
    if not think:
        raise ValueError(f"no way of ours is known for {via!r}")

    def plan(count: int) -> str:
        side, channels = pipe.latent_stride, pipe.transformer.config.latent_channels
        noise = torch.zeros(1, channels, side // pipe.vae_scale_factor, side // pipe.vae_scale_factor)
        options = {"think": True, "max_think_tokens": count, "num_inference_steps": 1, "output_type": "latent"}
        return pipe(text, image=pictures or None, height=side, width=side, latents=noise, **options).texts[0]

    return plan


@torch.no_grad()
def _generate_alone(pipe, text: str, end: int, count: int) -> str:
    """A context with one text, continued until `end`; decoded with the start token, as the original does here."""
    cache = pipe.transformer.new_cache()
    pipe.prefill([(cache, [pipe.text_segment(text)])])
    tokens = replace(pipe.special_tokens, text_end=end)
    said = generate_text(pipe.transformer, [cache], tokens, max_new_tokens=count)[0]
    return pipe.tokenizer.decode([tokens.text_start, *said])
