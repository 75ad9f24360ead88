"""How samples become one batch: lengths, positions, modes, masks, labels, weights. Ours is laid out in two streams, so
everything is compared by what it means, in the order of the original's one stream."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from echo4o.modeling.bagel.segments_bagel import (
    NO_LABEL,
    PackedSequence,
    SpecialTokens,
    grid_position_ids,
    pack,
    text_segment,
)
from echo4o.modeling.bagel.transformer_bagel import may_attend, training_plan

from ..golden import GoldenFile, Record
from ..report import SINGLE, Check
from .golden_set import GoldenSet
from .sequences import (
    Draws,
    Strides,
    attend_mask,
    golden_order,
    plan_mask,
    sample_lengths,
    sample_segments,
    segments_and_positions,
    splits,
)


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    json = file.json
    tokens = special_tokens(json["special_tokens"])
    strides = Strides(json["vit_patch_size"], json["vae_image_downsample"])
    sides = {"latent_positions": json["max_latent_size"], "patch_positions": json["max_num_patch_per_side"]}
    for name, case in json["cases"].items():
        with check.trying(name):
            draws = _draws(case, check.of(name))
            samples = [sample_segments(sample, tokens, strides, draws) for sample in case["samples"]]
            if draws is not None:
                check(f"{name}.random_draws used", draws.used, len(case["random_draws"]))
            sequence = pack(samples, **sides)
            check_packed(sequence, sides["latent_positions"], case["packed"].plain(), check.of(name))
            check_masks(sequence, file.tensors.series(f"{name}.attend_mask"), check.of(name))
            check(f"{name}.flex_mask_equals_dense_mask", _flex_agrees(sequence), case["flex_mask_equals_dense_mask"])
            _check_tail(sequence, case["flex_to_tensor_tail"], check.of(f"{name}.flex_to_tensor_tail"))
    with check.trying("small_mask"):
        _check_small_mask(json["small_mask"], file.tensors["small_mask"], check)
    for index, case in enumerate(json["position_id_functions"]):
        with check.trying(f"position_id_functions.{index}"):
            _check_position_ids(case, check.of(f"position_id_functions.{index}"))
    for length, want in json["len2weight_square"].items():
        with check.trying(f"len2weight_square.{length}"):
            segment = text_segment([0] * (int(length) - 1), tokens, loss=True)  # n labels: n-1 tokens and the end
            labelled = [w for w, label in zip(segment.label_weights, segment.labels) if label != NO_LABEL]
            check(f"len2weight_square.{length}", labelled, [want] * int(length), SINGLE)


def special_tokens(names: Record) -> SpecialTokens:
    """From the original's names for them."""
    return SpecialTokens(*(names[name] for name in ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")))


def _draws(case: Record, check: Check) -> Draws | None:
    """The case's condition dropout with its random numbers, which Python's generator gives again from the seed."""
    if "dropout_probs" not in case:
        return None
    values = case["random_draws"]
    generator = random.Random(case["random_seed"])
    check("random_draws", [generator.random() for _ in values], values)
    probabilities = {name.removesuffix("_p"): p for name, p in case["dropout_probs"].items()}
    return Draws(values, probabilities)


def check_packed(sequence: PackedSequence, latent_side: int, want: dict[str, Any], check: Check) -> None:
    """Compare with the original's packed sequence; `want` maps its names to values.

    `latent_side`: of the latent position table that the sequence was packed for.
    """
    want = dict(want)
    order = golden_order(sequence)
    und = len(sequence.input_ids)
    is_vision = torch.zeros(und, dtype=torch.bool)
    is_vision[sequence.vision_index] = True
    text = torch.cat([~is_vision, torch.zeros(len(sequence.gen_segment), dtype=torch.bool)])[order]
    lengths, modes = splits(sequence)
    got = {
        "sample_lens": sample_lengths(sequence),
        "curr": len(order),
        "split_lens": lengths,
        "attn_modes": modes,
        "packed_position_ids": segments_and_positions(sequence)[1],
        "packed_text_indexes": text.nonzero()[:, 0],
        "packed_text_ids": sequence.input_ids[order[text]],
        "packed_vae_token_indexes": (order >= und).nonzero()[:, 0],
        "packed_vit_token_indexes": torch.isin(order, sequence.vision_index).nonzero()[:, 0],
        "vit_token_seqlens": sequence.patch_lengths,
        "packed_latent_position_ids": sequence.latent_position_ids,
        "packed_vit_position_ids": sequence.patch_position_ids,
    }
    got |= _losses(sequence, order)
    got |= {"vae_latent_shapes": latent_grids(sequence, latent_side), "packed_timesteps": _raw_times(sequence, want)}
    for name in got:
        if name in ("packed_latent_position_ids", "packed_vit_position_ids"):
            want[name] = _flat(want[name])  # the original keeps one list per picture
        tolerance = SINGLE if name in ("ce_loss_weights", "packed_timesteps") else 0.0
        if name in want:
            check(name, got[name], want.pop(name), tolerance)
    for name in want:
        check.fail(name, "unknown, not checked")


def _losses(sequence: PackedSequence, order: torch.Tensor) -> dict[str, Any]:
    gen = len(sequence.gen_segment)
    labels = torch.cat([sequence.labels, torch.full((gen,), NO_LABEL)])[order]
    weights = torch.cat([sequence.label_weights, torch.zeros(gen)])[order]
    noised = torch.cat([torch.zeros(len(sequence.labels), dtype=torch.bool), sequence.gen_noised])[order]
    labelled = labels != NO_LABEL
    return {
        "packed_label_ids": labels[labelled],
        "ce_loss_indexes": labelled.nonzero()[:, 0],
        "ce_loss_weights": weights[labelled],
        "mse_loss_indexes": noised.nonzero()[:, 0],
    }


def latent_grids(sequence: PackedSequence, side: int) -> list[list[int]]:
    """[rows, columns] of every VAE picture, from the places of its tokens in the position table."""
    places = [sequence.latent_position_ids[span.gen] for spans in sequence.spans for span in spans]
    grids = [(len((ids // side).unique()), len((ids % side).unique())) for ids in places if len(ids)]
    return [list(grid) for grid in grids]


def _raw_times(sequence: PackedSequence, want: dict[str, Any]) -> torch.Tensor:
    """(G,) raw times: one draw per noised split, spread over its tokens; clean ones have -inf (null in the json)."""
    raw = want["packed_timesteps"] = [-torch.inf if x is None else x for x in _flat(want["packed_timesteps"])]
    times = torch.full((len(sequence.gen_segment),), -torch.inf, dtype=torch.float64)
    for number in sequence.gen_segment[sequence.gen_noised].unique().tolist():
        tokens = (sequence.gen_segment == number).nonzero()[:, 0]
        times[tokens] = float(raw[int(tokens[0])])
    return times


def _flat(values: Any) -> list:
    if isinstance(values, torch.Tensor):
        return values.tolist()
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def check_masks(sequence: PackedSequence, want: list[torch.Tensor], check: Check) -> None:
    """Masks of all samples, nothing between samples, and the very masks that a training forward uses."""
    mask = attend_mask(sequence)
    blocks = [
        mask.split(lengths := sample_lengths(sequence), dim=0)[i].split(lengths, dim=1) for i in range(len(want))
    ]
    check("attend_mask: samples", len(lengths), len(want))
    for index, expected in enumerate(want):
        check(f"attend_mask.{index}", blocks[index][index], expected)
    between = sum(int(blocks[i][j].sum()) for i in range(len(want)) for j in range(len(want)) if i != j)
    check("attend_mask: pairs across samples", between, 0)
    _check_training_plan(sequence, want, check)


def _check_training_plan(sequence: PackedSequence, want: list[torch.Tensor], check: Check) -> None:
    """The masks that the transformer itself builds per sample (und tokens before gen tokens), in the golden order."""
    plan, offset = training_plan(sequence), len(sequence.input_ids)
    order, start = golden_order(sequence), 0
    for index, (call, spans, expected) in enumerate(zip(plan, sequence.spans, want, strict=True)):
        tokens = order[start : start + len(expected)]
        start += len(expected)
        und, gen = slice(spans[0].und.start, spans[-1].und.stop), spans[0].gen.start
        inside = torch.where(tokens < offset, tokens - und.start, tokens - offset - gen + und.stop - und.start)
        check(f"training_plan.mask.{index}", plan_mask(call, len(expected))[inside[:, None], inside[None]], expected)


def _flex_agrees(sequence: PackedSequence) -> bool:
    """FlexAttention, given our one rule, builds the same mask as plain indexing does."""
    dense = attend_mask(sequence)
    segment, position = segments_and_positions(sequence)

    def rule(batch, head, q, k):
        return may_attend(sequence, segment[q], position[q], segment[k], position[k])

    n = len(segment)
    flexible = create_mask(rule, None, None, n, n, device="cpu")[0, 0]
    blocks = create_block_mask(rule, None, None, n, n, device="cpu", BLOCK_SIZE=16).to_dense()[0, 0].bool()
    side = 16 * len(blocks)
    padded = torch.zeros(side, side, dtype=torch.bool)
    padded[:n, :n] = dense
    any_inside = padded.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).any(3).any(1)
    return torch.equal(flexible, dense) and torch.equal(any_inside, blocks)


def _check_tail(sequence: PackedSequence, tail: Record, check: Check) -> None:
    """The original pads a packed sequence with one more sample up to a fixed length, because its compiled mask needs
    one. Ours has no padding; what comes before the original's must be the same, and its length follows."""
    lengths, modes = splits(sequence)
    samples = sample_lengths(sequence)
    rest = tail["max_num_tokens"] - sum(lengths)
    check("split_lens", [*lengths, rest], tail["split_lens"])
    check("attn_modes", [*modes, "causal"], tail["attn_modes"])
    check("sample_lens", [*samples, rest], tail["sample_lens"])


def _check_small_mask(case: Record, want: torch.Tensor, check: Check) -> None:
    """Our rule on a bare table of splits, without a sequence around it."""
    lengths, modes = torch.tensor(case["split_lens"]), case["attn_modes"]
    table = SimpleNamespace(
        segment_sample=torch.zeros(len(modes), dtype=torch.long),
        segment_causal=torch.tensor([mode == "causal" for mode in modes]),
        segment_hidden=torch.tensor([mode == "noise" for mode in modes]),
    )
    segment, position = torch.arange(len(modes)).repeat_interleave(lengths), torch.arange(int(lengths.sum()))
    check("small_mask", may_attend(table, segment[:, None], position[:, None], segment[None], position[None]), want)


def _check_position_ids(case: Record, check: Check) -> None:
    grid, side = (case["img_h"] // case["patch"], case["img_w"] // case["patch"]), case["max_per_side"]
    check("extrapolate", grid_position_ids(grid, side), case["extrapolate"])
    check("interpolate", grid_position_ids(grid, side, interpolate=True), case["interpolate"])
