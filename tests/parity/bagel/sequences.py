"""From the plans of golden samples to our segments, and from our two streams back to the golden order of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from echo4o.modeling.bagel.segments_bagel import (
    PackedSequence,
    Segment,
    SpecialTokens,
    drop,
    image_segment,
    text_segment,
)
from echo4o.modeling.bagel.transformer_bagel import may_attend

from ..golden import Record


class Strides(NamedTuple):
    """Pixels per ViT patch and per latent token."""

    vit: int
    vae: int


class Draws:
    """Recorded random numbers of condition dropout, handed out in order."""

    def __init__(self, values: Sequence[float], probabilities: dict[str, float]):
        self._values, self._probabilities = list(values), probabilities
        self.used = 0

    def drops(self, kind: str) -> bool:
        if not self._probabilities:
            return False
        self.used += 1
        return self._values[self.used - 1] < self._probabilities[kind]


def sample_segments(
    sample: Record, tokens: SpecialTokens, strides: Strides, draws: Draws | None = None
) -> list[Segment]:
    """One golden sample as segments.

    `sample` has the plan of the original's dataset classes: its items in order, `text_ids` of the texts among them and
    `image_shapes` (C, H, W) of the pictures.
    """
    texts, shapes = iter(sample["text_ids"]), iter(sample["image_shapes"])
    segments: list[Segment] = []
    hidden = False
    for item in sample["plan"]:
        kind = item["type"]
        loss, end_label = bool(item["loss"]), item["special_token_label"] if item["special_token_loss"] else None
        item.note("special_token_label")
        if kind == "text":
            segment = text_segment(next(texts), tokens, loss=loss, end_label=end_label)
        else:
            _, height, width = next(shapes)
            stride = strides.vit if kind == "vit_image" else strides.vae
            options: dict = {}
            if kind == "vae_image":
                first, delta = bool(item.get("split_start", True)), item.get("frame_delta")
                item.note("split_end")
                # A clip's frames attend as one, in the mode that its first frame asks for.
                hidden = (loss and delta is None) if first else hidden
                options = {"joined": not first, "advance": delta, "hidden": hidden}
            name = "vit" if kind == "vit_image" else "noise" if loss else "vae"
            segment = image_segment(name, (height // stride, width // stride), tokens, end_label=end_label, **options)
        dropped = bool(item["enable_cfg"]) and draws is not None and draws.drops(kind.removesuffix("_image"))
        segments.append(drop(segment) if dropped else segment)
    return segments


def golden_order(sequence: PackedSequence) -> torch.Tensor:
    """(S,) places in `cat([und, gen])` of the tokens as the original lays them out: start, picture, end."""
    offset = len(sequence.input_ids)
    order: list[int] = []
    for spans in sequence.spans:
        for span in spans:
            und, gen = range(span.und.start, span.und.stop), range(span.gen.start + offset, span.gen.stop + offset)
            order += [und[0], *gen, *und[1:]] if len(gen) else und
    return torch.tensor(order, dtype=torch.long)


def in_golden_order(sequence: PackedSequence, und: torch.Tensor, gen: torch.Tensor) -> torch.Tensor:
    """One value per token of the whole sequence from one per token of each stream."""
    return torch.cat([und, gen])[golden_order(sequence)]


def segments_and_positions(sequence: PackedSequence) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) segment and rotary position of every token, in the golden order."""
    segment = in_golden_order(sequence, sequence.und_segment, sequence.gen_segment)
    return segment, in_golden_order(sequence, sequence.und_position, sequence.gen_position)


def attend_mask(sequence: PackedSequence) -> torch.Tensor:
    """(S, S) bool: who may attend to whom in the whole batch, in the golden order."""
    segment, position = segments_and_positions(sequence)
    return may_attend(sequence, segment[:, None], position[:, None], segment[None], position[None])


def plan_mask(call, size: int) -> torch.Tensor:
    """The mask of one call of a training plan over `size` tokens; a plan leaves it out where everything sees everything."""
    return torch.ones(size, size, dtype=torch.bool) if call.mask is None else call.mask


def sample_lengths(sequence: PackedSequence) -> list[int]:
    """Tokens of each sample."""
    return [sum(_length(span) for span in spans) for spans in sequence.spans]


def splits(sequence: PackedSequence) -> tuple[list[int], list[str]]:
    """Length and attention mode of each span that attends as one, by the original's names."""
    segment, _ = segments_and_positions(sequence)
    numbers, lengths = torch.unique_consecutive(segment, return_counts=True)
    modes = []
    for number in numbers.tolist():
        causal, hidden = bool(sequence.segment_causal[number]), bool(sequence.segment_hidden[number])
        modes.append("causal" if causal else "noise" if hidden else "full")
    return lengths.tolist(), modes


def _length(span) -> int:
    return span.und.stop - span.und.start + span.gen.stop - span.gen.start
