"""Describes BAGEL's input: a sample is a list of segments, and a batch is many samples packed into two streams.

Training, prefill, denoising and text generation describe their input as lists of [`Segment`] and call [`pack`]. This
file holds no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch

NO_LABEL = -100  # torch's cross_entropy ignores it


@dataclass(frozen=True)
class SpecialTokens:
    """Vocabulary ids of the tokens before and after the content of a segment."""

    text_start: int  # <|im_start|>
    text_end: int  # <|im_end|>
    image_start: int  # <|vision_start|>
    image_end: int  # <|vision_end|>

    @classmethod
    def from_tokenizer(cls, tokenizer) -> SpecialTokens:
        """Look up the four tokens. Raises ValueError naming those that the tokenizer lacks."""
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        ids = tokenizer.convert_tokens_to_ids(list(names))
        missing = [n for n, i in zip(names, ids) if i is None or tokenizer.convert_ids_to_tokens(i) != n]
        if missing:
            raise ValueError(f"The tokenizer has no {', '.join(missing)}; BAGEL needs all of {', '.join(names)}.")
        return cls(*ids)


def check_tokenizer(tokenizer, vocabulary: int) -> None:
    """Raise ValueError if a tokenizer lacks special tokens, or has more tokens than the transformer embeds."""
    SpecialTokens.from_tokenizer(tokenizer)
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the transformer embeds {vocabulary}: they do not belong "
            "together."
        )


@dataclass(frozen=True)
class Segment:
    """A text or an image of a sample, of one of four kinds (tests/parity/golden/README.md, "Conventions").

    | kind    | attention inside | later segments attend to it | expert of its content | rotary positions          |
    |---------|------------------|-----------------------------|-----------------------|---------------------------|
    | `text`  | causal           | yes                         | und                   | one per token             |
    | `vit`   | full             | yes                         | und                   | all share one, next is +1 |
    | `vae`   | full             | yes                         | gen                   | all share one, next is +1 |
    | `noise` | full             | no                          | gen                   | all share one, next is +0 |

    An image's start and end tokens belong to its segment and always use the understanding expert.
    """

    kind: str
    ids: tuple[int, ...]  # vocabulary ids: of the text with its start and end tokens, or of an image's (start, end)
    grid: tuple[int, int] = (0, 0)  # image: (rows, columns) of ViT patches or latent tokens
    data: torch.Tensor | None = None  # vit: patches (rows*columns, p*p*3); vae, noise: latent tokens (rows*columns, C)
    labels: tuple[int, ...] | None = None  # next-token labels of `ids`, NO_LABEL where there is none
    label_weights: tuple[float, ...] | None = None
    dropped: bool = False  # left out by condition dropout; a dropped image still advances the position, text does not
    joined: bool = False  # attends with the segment before it as if both were one (frames of a video)
    advance: int | None = None  # distance to the next segment's rotary position; None: by the kind
    hidden: bool | None = None  # other segments do not attend to it; None: only `noise` is hidden

    @property
    def size(self) -> int:
        """Number of image tokens (0 for text)."""
        return self.grid[0] * self.grid[1]

    @property
    def step(self) -> int:
        """Distance from this segment's rotary position to the next one's."""
        if self.advance is not None:
            return self.advance
        return {"text": 0 if self.dropped else len(self.ids), "vit": 1, "vae": 1, "noise": 0}[self.kind]

    def __len__(self) -> int:
        return len(self.ids) + self.size


def text_segment(
    ids: Sequence[int], tokens: SpecialTokens, *, loss: bool = False, end_label: int | None = None
) -> Segment:
    """Text between its start and end token.

    Args:
        loss: every token but the last one has the next token as its label. Each of the n labels has the weight
            1/sqrt(n), as in the original training code.
        end_label: label of the end token, with the weight 1: the token that should follow the segment.
    """
    content = (tokens.text_start, *ids, tokens.text_end)
    if not loss and end_label is None:
        return Segment("text", content)
    n = len(content) - 1
    labels = (*(content[1:] if loss else [NO_LABEL] * n), NO_LABEL if end_label is None else end_label)
    return Segment("text", content, labels=labels, label_weights=(*([n**-0.5] * n), 1.0))


def image_segment(
    kind: str,
    grid: tuple[int, int],
    tokens: SpecialTokens,
    data: torch.Tensor | None = None,
    *,
    end_label: int | None = None,
    **options,
) -> Segment:
    """An image of `grid` = (rows, columns) tokens, of the kind `vit`, `vae` (clean, t = 0) or `noise`."""
    assert kind in ("vit", "vae", "noise"), kind
    assert data is None or data.shape[0] == grid[0] * grid[1], (tuple(data.shape), grid)
    labels = None if end_label is None else (NO_LABEL, end_label)
    weights = None if end_label is None else (0.0, 1.0)
    ids = (tokens.image_start, tokens.image_end)
    return Segment(kind, ids, grid, data, labels=labels, label_weights=weights, **options)


def drop(segment: Segment) -> Segment:
    """The segment after condition dropout: it has no tokens, but an image still advances the rotary position."""
    return replace(segment, dropped=True)


def end_position(segments: Sequence[Segment], start: int = 0) -> int:
    """Rotary position of the segment after `segments`, of which the first has the position `start`."""
    return start + sum(segment.step for segment in segments)


def grid_position_ids(grid: tuple[int, int], per_side: int, interpolate: bool = False) -> torch.Tensor:
    """Indices of an image's tokens in a position table of `per_side` x `per_side` entries, row by row: (rows*columns,).

    `interpolate` spreads the image over the whole table instead of using its upper left part.
    Raises ValueError if a side of the image is longer than the table's.
    """
    if max(grid) > per_side:
        raise ValueError(f"An image of {grid[0]} x {grid[1]} tokens exceeds the {per_side} x {per_side} positions.")

    def side(n: int) -> torch.Tensor:
        if not interpolate:
            return torch.arange(n)
        return torch.bucketize(
            torch.arange(0, 1 - 1e-6, 1 / n), torch.arange(1 / per_side, 1.0, 1 / per_side), right=True
        )

    rows, columns = side(grid[0]), side(grid[1])
    return (rows[:, None] * per_side + columns).flatten()


def patchify(latent: torch.Tensor, patch: int) -> torch.Tensor:
    """(C, H, W) -> tokens ((H/p)*(W/p), p*p*C), each flattened as (row, column, channel) of its patch."""
    channels, height, width = latent.shape
    blocks = latent.reshape(channels, height // patch, patch, width // patch, patch)
    return blocks.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch: int) -> torch.Tensor:
    """Inverse of [`patchify`]: (rows*columns, p*p*C) -> (C, rows*p, columns*p)."""
    rows, columns = grid
    blocks = tokens.reshape(rows, columns, patch, patch, -1)
    return blocks.permute(4, 0, 2, 1, 3).reshape(-1, rows * patch, columns * patch)


class KVCache(Protocol):
    """The key and value cache of the transformer (`BagelKVCache`), as the pipeline uses it."""

    num_layers: int
    length: int  # tokens of context
    position: int  # rotary position of the next segment

    def first(self, length: int) -> Any: ...
    def whole(self) -> Any: ...
    def reserve(self, capacity: int, scratch: int = 0) -> None: ...
    def copy_from(self, start: int) -> list[torch.Tensor]: ...
    def extend(self, states: list[torch.Tensor], position: int) -> None: ...
    def truncate(self, length: int, position: int) -> None: ...


class Span(NamedTuple):
    """The places of one segment's tokens in the two streams."""

    und: slice
    gen: slice
    causal: bool
    hidden: bool


@dataclass
class PackedSequence:
    """Samples packed into an `und` stream of U tokens and a `gen` stream of G tokens, without padding.

    The tokens of a sample are contiguous in each stream. Attention masks are derived from the segment and the position
    of each token, never from its place in a stream.
    """

    input_ids: torch.Tensor  # (U,) vocabulary ids; 0 for ViT tokens
    vision_index: torch.Tensor  # (V,) places of the ViT tokens in the und stream
    und_segment: torch.Tensor  # (U,) index of the token's segment in the whole batch
    und_position: torch.Tensor  # (U,) rotary position
    gen_segment: torch.Tensor  # (G,)
    gen_position: torch.Tensor  # (G,)
    gen_noised: torch.Tensor  # (G,) bool: the token belongs to a noised segment
    latent_position_ids: torch.Tensor  # (G,) indices in the latent position table
    patch_position_ids: torch.Tensor  # (V,) indices in the ViT position table
    segment_sample: torch.Tensor  # (N,) sample of each segment
    segment_causal: torch.Tensor  # (N,) bool
    segment_hidden: torch.Tensor  # (N,) bool
    labels: torch.Tensor  # (U,) next-token labels, NO_LABEL where there is none
    label_weights: torch.Tensor  # (U,)
    patches: torch.Tensor | None  # (V, p*p*3) pixels of all ViT segments
    latents: torch.Tensor | None  # (G, C) clean latent tokens of all VAE segments
    patch_lengths: list[int]  # number of patches of each ViT image
    spans: list[list[Span]]  # per sample, in order

    def to(self, device: torch.device | str) -> PackedSequence:
        """The same batch with every tensor on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)})


def pack(
    samples: Sequence[Sequence[Segment]],
    *,
    latent_positions: int,
    patch_positions: int,
    starts: Sequence[int] | None = None,
) -> PackedSequence:
    """Pack samples into one batch.

    Args:
        samples: one list of segments per sample (or per row of an inference batch).
        latent_positions, patch_positions: entries per side of the latent's and the ViT's position tables.
        starts: rotary position of each sample's first token; None: 0. In inference, the position after its context.
    """
    und: dict[str, list] = {k: [] for k in ("ids", "vision", "segment", "position", "labels", "weights")}
    gen: dict[str, list] = {k: [] for k in ("segment", "position", "noised", "table")}
    table: list[tuple[int, bool, bool]] = []  # (sample, causal, hidden) of each segment
    patch_table, patches, latents, patch_lengths, spans = [], [], [], [], []
    for index, sample in enumerate(samples):
        position = starts[index] if starts is not None else 0
        row: list[Span] = []
        for segment in sample:
            if segment.dropped:
                position += segment.step
                continue
            causal = segment.kind == "text"
            hidden = segment.kind == "noise" if segment.hidden is None else segment.hidden
            if not (segment.joined and row):
                table.append((index, causal, hidden))
            number = len(table) - 1
            und_start, gen_start = len(und["ids"]), len(gen["segment"])
            in_und = 0 if segment.kind in ("vae", "noise") else segment.size
            length = len(segment.ids) + in_und
            if causal:
                und["ids"] += segment.ids
            else:
                und["ids"] += [segment.ids[0], *[0] * in_und, *segment.ids[1:]]
            und["vision"] += range(und_start + 1, und_start + 1 + in_und)
            und["segment"] += [number] * length
            und["position"] += range(position, position + length) if causal else [position] * length
            gap = [NO_LABEL] * in_und
            labels = segment.labels or (NO_LABEL,) * len(segment.ids)
            weights = segment.label_weights or (0.0,) * len(segment.ids)
            und["labels"] += labels if causal else [labels[0], *gap, *labels[1:]]
            und["weights"] += weights if causal else [weights[0], *[0.0] * in_und, *weights[1:]]
            if segment.kind == "vit":
                patch_table.append(grid_position_ids(segment.grid, patch_positions))
                patch_lengths.append(segment.size)
                patches.append(segment.data)
            elif not causal:
                gen["segment"] += [number] * segment.size
                gen["position"] += [position] * segment.size
                gen["noised"] += [segment.kind == "noise"] * segment.size
                gen["table"].append(grid_position_ids(segment.grid, latent_positions))
                latents.append(segment.data)
            row.append(Span(slice(und_start, len(und["ids"])), slice(gen_start, len(gen["segment"])), causal, hidden))
            position += segment.step
        spans.append(row)

    def ints(values):
        return torch.tensor(values, dtype=torch.long)

    def cat(parts):
        return torch.cat(parts) if parts else ints([])

    def joined(parts):
        return None if not parts or any(part is None for part in parts) else torch.cat(parts)

    sample, causal, hidden = zip(*table, strict=True) if table else ((), (), ())
    return PackedSequence(
        input_ids=ints(und["ids"]),
        vision_index=ints(und["vision"]),
        und_segment=ints(und["segment"]),
        und_position=ints(und["position"]),
        gen_segment=ints(gen["segment"]),
        gen_position=ints(gen["position"]),
        gen_noised=torch.tensor(gen["noised"], dtype=torch.bool),
        latent_position_ids=cat(gen["table"]),
        patch_position_ids=cat(patch_table),
        segment_sample=ints(sample),
        segment_causal=torch.tensor(causal, dtype=torch.bool),
        segment_hidden=torch.tensor(hidden, dtype=torch.bool),
        labels=ints(und["labels"]),
        label_weights=torch.tensor(und["weights"], dtype=torch.float32),
        patches=joined(patches),
        latents=joined(latents),
        patch_lengths=patch_lengths,
        spans=spans,
    )
