"""Who may attend to whom, from hand-drawn pictures of the rule and from random samples."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from echo4o.modeling.bagel.segments_bagel import SpecialTokens, image_segment, pack, text_segment
from echo4o.modeling.bagel.transformer_bagel import may_attend, training_plan

from ..parity.bagel.sequences import attend_mask, golden_order, plan_mask, sample_lengths, segments_and_positions

TOKENS = SpecialTokens(1, 2, 3, 4)


def picture(kind: str, rows: int = 1, columns: int = 1, **options):
    return image_segment(kind, (rows, columns), TOKENS, **options)


def packed(*samples):
    return pack(samples, latent_positions=8, patch_positions=8)


def drawn(mask: torch.Tensor) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]


def test_text_then_image():
    sequence = packed([text_segment([7], TOKENS), picture("noise")])
    assert drawn(attend_mask(sequence)) == [
        "x.....",
        "xx....",
        "xxx...",
        "xxxxxx",
        "xxxxxx",
        "xxxxxx",
    ]


def test_no_token_attends_to_a_noised_image_and_later_ones_attend_to_a_clean_one():
    """Editing in several turns: the picture drawn first is given again as a clean one."""
    sequence = packed([text_segment([], TOKENS), picture("noise"), picture("vae"), text_segment([], TOKENS)])
    assert drawn(attend_mask(sequence)) == [
        "x.........",
        "xx........",
        "xxxxx.....",
        "xxxxx.....",
        "xxxxx.....",
        "xx...xxx..",
        "xx...xxx..",
        "xx...xxx..",
        "xx...xxxx.",
        "xx...xxxxx",
    ]


def test_frames_of_a_clip_attend_as_one():
    frames = [picture("noise", advance=2, hidden=False), picture("noise", joined=True, hidden=False)]
    sequence = packed([text_segment([], TOKENS), *frames, text_segment([], TOKENS)])
    mask = attend_mask(sequence)
    assert mask[2:8, :8].all() and not mask[2:8, 8:].any()  # two frames of three tokens each
    assert mask[8:, :8].all()  # seen by what follows
    assert segments_and_positions(sequence)[1].tolist() == [0, 1, 2, 2, 2, 4, 4, 4, 4, 5]


def random_samples(seed: int) -> list[list]:
    draw = random.Random(seed)
    samples = []
    for _ in range(draw.randint(1, 4)):
        segments = []
        for _ in range(draw.randint(1, 6)):
            kind = draw.choice(["text", "text", "vit", "vae", "noise"])
            if kind == "text":
                segments.append(text_segment([9] * draw.randint(0, 5), TOKENS))
            else:
                segments.append(picture(kind, draw.randint(1, 3), draw.randint(1, 3)))
        samples.append(segments)
    return samples


def slow_mask(samples: list[list]) -> torch.Tensor:
    """The rule spelt out token by token, without our tables."""
    tokens = [
        (s, n, i, segment)
        for s, sample in enumerate(samples)
        for n, segment in enumerate(sample)
        for i in range(len(segment))
    ]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for q, (sample, number, place, segment) in enumerate(tokens):
        for k, (k_sample, k_number, k_place, k_segment) in enumerate(tokens):
            if sample == k_sample and number == k_number:
                mask[q, k] = segment.kind != "text" or k_place <= place
            elif sample == k_sample and k_number < number:
                mask[q, k] = k_segment.kind != "noise"
    return mask


@pytest.mark.parametrize("seed", range(8))
def test_rule_plan_and_flex_attention_agree(seed):
    samples = random_samples(seed)
    sequence = packed(*samples)
    want = slow_mask(samples)
    assert torch.equal(attend_mask(sequence), want)

    segment, position = segments_and_positions(sequence)

    def rule(batch, head, q, k):
        return may_attend(sequence, segment[q], position[q], segment[k], position[k])

    assert torch.equal(create_mask(rule, None, None, len(want), len(want), device="cpu")[0, 0], want)

    order, und, start = golden_order(sequence), len(sequence.input_ids), 0
    for length, call in zip(sample_lengths(sequence), training_plan(sequence), strict=True):
        tokens = order[start : start + length]
        # The plan's masks have a sample's und tokens before its gen tokens.
        two_streams = torch.cat([(tokens < und).nonzero()[:, 0], (tokens >= und).nonzero()[:, 0]])
        inside = want[start : start + length, start : start + length]
        assert torch.equal(plan_mask(call, length), inside[two_streams][:, two_streams])
        start += length


def test_positions_follow_the_kinds():
    """Text: one per token. A clean picture: one for all its tokens, next at +1. A noised one: next at +0."""
    text = text_segment([5, 5], TOKENS)
    sequence = packed([text, picture("vae", 1, 2), picture("vit"), picture("noise"), picture("vae"), text])
    want = [0, 1, 2, 3, *[4] * 4, *[5] * 3, *[6] * 3, *[6] * 3, 7, 8, 9, 10]
    assert segments_and_positions(sequence)[1].tolist() == want


def test_an_image_beyond_the_position_table_is_refused():
    with pytest.raises(ValueError, match="9 x 1 .* 8 x 8"):
        packed([picture("noise", 9, 1)])
