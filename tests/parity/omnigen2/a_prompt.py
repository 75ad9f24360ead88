"""Prompts to chat text, ids and last hidden states."""

from __future__ import annotations

import torch

from echo4o.modeling.omnigen2.prompts_omnigen2 import SYSTEM_PROMPT, prompt_text

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .comparing import compare_masks
from .golden_set import GoldenSet


@torch.no_grad()
def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    pipe, json, tensors = golden.pipe, file.json, file.tensors
    check("system_prompt", SYSTEM_PROMPT, json["system_prompt"])
    check("padding_side", pipe.tokenizer.padding_side, json["padding_side"])
    check("pad_token_id", pipe.tokenizer.pad_token_id, json["pad_token_id"])
    for index, case in enumerate(json["single"]):
        with check.trying(f"single.{index}"):
            _check_text(pipe, case, tensors[f"single.{index}.embeds"], check.of(f"single.{index}"))
    with check.trying("negative_of_none"):
        negative = json["negative_of_none"]
        check("negative_of_none.text", prompt_text(""), negative["text"])
        check("negative_of_none.ids", pipe.token_ids(prompt_text("")), negative["ids"])
        features = pipe.text_features(negative["ids"])
        check("negative_of_none.embeds", features, tensors["negative_of_none.embeds"], SINGLE)
    with check.trying("hidden"):
        _check_hidden(pipe, json, tensors, check.of("hidden"))
    with check.trying("batch2"):
        _check_batch(pipe, json["batch2"], tensors.under("batch2"), check.of("batch2"))
    with check.trying("batch2_x2"):
        case = json["batch2_x2"]
        case.note("row_order_embeds", "row_order_mask")
        _check_copies(pipe, case, tensors.under("batch2_x2"), check.of("batch2_x2"))
    with check.trying("truncated"):
        _check_truncated(pipe, json["truncated"], tensors.under("truncated"), check.of("truncated"))


def _check_text(pipe, case, embeds, check) -> None:
    check("text", prompt_text(case["prompt"]), case["text"])
    ids = pipe.token_ids(prompt_text(case["prompt"]))
    check("ids", ids, case["ids"])
    check("embeds", pipe.text_features(ids), embeds, SINGLE)


def _check_hidden(pipe, json, tensors, check) -> None:
    """The features are the last of all hidden states, after the final norm."""
    ids = torch.tensor([json["single"][0]["ids"]])
    states = pipe.mllm(input_ids=ids, output_hidden_states=True).hidden_states
    check("count", len(states), json["n_hidden_states"])
    check("first", states[0], tensors["hidden.first"], SINGLE)
    check("before_last", states[-2], tensors["hidden.before_last"], SINGLE)


def _features(pipe, prompts, max_length=None):
    return [pipe.text_features(pipe.token_ids(prompt_text(p), max_length)) for p in prompts]


def _check_rows(check, part, features, embeds, mask, rows=None) -> None:
    compare_masks(check, f"{part}mask", [len(f) for f in features], mask, rows)
    for row in range(len(features)):
        if rows is None or row in rows:
            check(f"{part}embeds.{row}", features[row], embeds[row, : len(features[row])], SINGLE)


def _check_batch(pipe, case, tensors, check) -> None:
    features = _features(pipe, case["prompts"])
    for row, ids in enumerate(case["ids"]):
        own = pipe.token_ids(prompt_text(case["prompts"][row]))
        check(f"ids.{row}", own + [pipe.tokenizer.pad_token_id] * (len(ids) - len(own)), ids)
    _check_rows(check, "", features, tensors["embeds"], tensors["mask"])
    negative = _features(pipe, case["negative"])
    _check_rows(check, "negative_", negative, tensors["negative_embeds"], tensors["negative_mask"])


def _check_copies(pipe, case, tensors, check) -> None:
    """The original orders embeddings by prompt and masks by copy; only rows where both agree can be compared."""
    prompts, copies = case["prompts"], case["num_images_per_prompt"]
    rows = [r for r in range(len(prompts) * copies) if r // copies == r % len(prompts)]
    features = [f for f in _features(pipe, prompts) for _ in range(copies)]
    _check_rows(check, "", features, tensors["embeds"], tensors["mask"], rows)
    negative = _features(pipe, [""]) * len(features)
    _check_rows(check, "negative_", negative, tensors["negative_embeds"], tensors["negative_mask"])


def _check_truncated(pipe, case, tensors, check) -> None:
    length = case["max_sequence_length"]
    check("ids", pipe.token_ids(prompt_text(case["prompt"]), length), case["ids"])
    _check_rows(check, "", _features(pipe, [case["prompt"]], length), tensors["embeds"], tensors["mask"])
    negative = _features(pipe, [case["negative"]], length)
    _check_rows(check, "negative_", negative, tensors["negative_embeds"], tensors["negative_mask"])
