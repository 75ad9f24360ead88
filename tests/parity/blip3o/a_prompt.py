"""Prompts: template, token ids, and the states of the queries; also as one batch."""

from __future__ import annotations

import torch

from echo4o.modeling.blip3o.conditions_blip3o import query_states
from echo4o.modeling.blip3o.prompts_blip3o import encode, generation_text

from ..golden import GoldenFile
from ..report import Check
from .golden_set import GoldenSet, caption_of
from .tolerances import close


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    pipe, tensors = golden.pipeline, file.tensors
    prompts = file.json["arguments"]["prompts"]
    file.json["arguments"].note("note")
    queries, ids = pipe.transformer.queries(), []
    for number, prompt in enumerate(prompts):
        text = prompt["text"]
        ids.append(encode(pipe.tokenizer, text))
        check(f"p{number}.input_ids", ids[-1], prompt["input_ids"])
        check(f"p{number}.tokens", pipe.tokenizer.convert_ids_to_tokens(ids[-1]), prompt["tokens"])
        if (caption := caption_of(text)) is not None:
            check(f"p{number}.text", generation_text(caption), text)
        length = len(ids[-1]) + 1 + queries.shape[1]
        check(f"p{number}.length_with_queries", length, prompt["length_with_queries"])
        # The original's mask lacks a column (README, surprise 6).
        check(f"p{number}.attention_mask_length", length - 1, prompt["attention_mask_length"])
        with check.trying(f"p{number}.cond"):
            close(check, f"p{number}.cond", pipe.encode_texts([text]), tensors[f"p{number}.cond"])
        if f"p{number}.inputs_embeds" in tensors:
            with check.trying(f"p{number}.inside"):
                _check_inside(golden, ids[-1], tensors.under(f"p{number}"), check.of(f"p{number}"))
    with check.trying("batch"):
        batch = pipe.encode_texts([prompt["text"] for prompt in prompts])
        for number in range(len(prompts)):
            close(check, f"batch.p{number}.cond", batch[number : number + 1], tensors[f"p{number}.cond"])


def _check_inside(golden: GoldenSet, ids: list[int], tensors, check: Check) -> None:
    pipe, seen = golden.pipeline, {}
    tokens, model = pipe.token_ids, pipe.language_model.model.language_model
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args, kwargs, n=n: seen.update({n: (*args, *kwargs.values())[0]}), with_kwargs=True
        )
        for n, layer in enumerate(model.layers)
    ]
    hooks.append(model.norm.register_forward_hook(lambda m, args, out: seen.update({len(model.layers): out})))
    try:
        query_states(pipe.language_model, [[*ids, tokens.image_start]], pipe.transformer.queries(), tokens.pad)
    finally:
        for hook in hooks:
            hook.remove()
    close(check, "inputs_embeds", seen[0], tensors["inputs_embeds"])
    want = tensors.series("hidden")
    check("hidden: states", len(seen), len(want))
    for number, values in enumerate(want):
        close(check, f"hidden.{number}", seen[number], values)
    mask = tensors["attention_mask"]
    check("attention_mask: all ones", bool((mask == 1).all()), True)
    check("attention_mask: columns", mask.shape[1], want[0].shape[1] - 1)
