"""Text from BAGEL, token by token, for a batch of contexts of any lengths."""

from collections.abc import Sequence

import torch

from ..common.step_cache import whole_pass
from .segments_bagel import Segment, SpecialTokens, pack


def choose(logits: torch.Tensor, do_sample: bool, temperature: float, generator: torch.Generator | None) -> int:
    """Next token from (vocabulary,) logits: the largest, or a draw from softmax(logits / temperature)."""
    if not do_sample:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate_text(
    transformer,
    caches: Sequence,
    tokens: SpecialTokens,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 0.3,
    generators: Sequence[torch.Generator | None] | None = None,
    device: torch.device | str = "cpu",
    progress=None,
) -> list[list[int]]:
    """Continue every cache with a text of at most `max_new_tokens` tokens, without its markers.

    Rows that have ended leave the batch. The caches come back as they were: what was said is not kept in them,
    because BAGEL reads its own text again as a closed segment (tests/parity/golden/README.md, surprise 7).
    """
    generators = generators or [None] * len(caches)
    ends = [(cache.length, cache.position) for cache in caches]
    said: list[list[int]] = [[] for _ in caches]
    fed = [tokens.text_start] * len(caches)
    running = list(range(len(caches)))
    for cache in caches:
        cache.reserve(cache.length + max_new_tokens)
    for _ in range(max_new_tokens):
        sequence = pack(
            [[Segment("text", (fed[row],))] for row in running],
            latent_positions=1,
            patch_positions=1,
            starts=[caches[row].position for row in running],
        ).to(device)
        with whole_pass(transformer):
            logits = transformer(
                None,
                None,
                sequence,
                contexts=[caches[row].whole() for row in running],
                logit_index=torch.arange(len(running), device=device),
            ).logits
        for row, row_logits in zip(running, logits, strict=True):
            caches[row].position += 1
            fed[row] = choose(row_logits, do_sample, temperature, generators[row])
            if fed[row] != tokens.text_end:
                said[row].append(fed[row])
        running = [row for row in running if fed[row] != tokens.text_end]
        if progress is not None:
            progress.update()
        if not running:
            break
    for cache, end in zip(caches, ends, strict=True):
        cache.truncate(*end)
    return said
