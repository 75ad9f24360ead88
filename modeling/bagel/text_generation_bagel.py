"""Generates text token by token, for a batch of contexts of any lengths."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..common.step_cache import uncached_pass
from .segments_bagel import KVCache, Segment, SpecialTokens, pack


def choose_token(logits: torch.Tensor, do_sample: bool, temperature: float, generator: torch.Generator | None) -> int:
    """Next token from (vocabulary,) logits: the likeliest, or one sampled from softmax(logits / temperature)."""
    if not do_sample:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate_text(
    transformer: Any,
    caches: Sequence[KVCache],
    tokens: SpecialTokens,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 0.3,
    generators: Sequence[torch.Generator | None] | None = None,
    device: torch.device | str = "cpu",
    progress: Any = None,
    on_token: Callable[[int, list[int]], Any] | None = None,
) -> list[list[int]]:
    """Generate at most `max_new_tokens` tokens after every cache; returns them without start and end token.

    `on_token` is called after each token with the index of the text and its tokens so far. The text ends if it returns
    True.

    Texts that have ended leave the batch. The caches are restored: BAGEL reads its own text again as a complete segment
    (tests/parity/golden/README.md, surprise 7).
    """
    generators = generators or [None] * len(caches)
    ends = [(cache.length, cache.position) for cache in caches]
    generated: list[list[int]] = [[] for _ in caches]
    last = [tokens.text_start] * len(caches)
    running = list(range(len(caches)))
    for cache in caches:
        cache.reserve(cache.length + max_new_tokens)
    for _ in range(max_new_tokens):
        sequence = pack(
            [[Segment("text", (last[row],))] for row in running],
            latent_positions=1,
            patch_positions=1,
            starts=[caches[row].position for row in running],
        ).to(device)
        with uncached_pass(transformer):
            logits = transformer(
                None,
                None,
                sequence,
                contexts=[caches[row].whole() for row in running],
                logit_index=torch.arange(len(running), device=device),
            ).logits
        for row, row_logits in zip(running, logits, strict=True):
            caches[row].position += 1
            last[row] = choose_token(row_logits, do_sample, temperature, generators[row])
            if last[row] != tokens.text_end:
                generated[row].append(last[row])
                if on_token is not None and on_token(row, list(generated[row])) is True:
                    last[row] = tokens.text_end
        running = [row for row in running if last[row] != tokens.text_end]
        if progress is not None:
            progress.update()
        if not running:
            break
    for cache, end in zip(caches, ends, strict=True):
        cache.truncate(*end)
    return generated
