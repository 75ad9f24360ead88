"""How much arithmetic a batch needs, from the model's sizes; and how fast the machine multiplies matrices."""

from __future__ import annotations

import time

import torch

from echo4o.modeling.bagel.transformer_bagel import prefix_length
from echo4o.training.samples import TrainingBatch


class Arithmetic:
    """Counts the floating point operations of matrix products, forward and backward, without recomputation.

    Only what gradients need is counted: nothing backward through a frozen prefix, no weight gradients of frozen
    weights (those of LoRA are too small to count).

    Args:
        transformer, vision_model: configurations.
        learning: parts whose own weights learn.
        prefix_is_frozen: whether und tokens before a sample's first VAE segment have no backward pass.
    """

    def __init__(self, transformer, vision_model, learning: set[str], prefix_is_frozen: bool):
        t, v = transformer, vision_model
        self.learning, self.prefix_is_frozen, self.layers = learning, prefix_is_frozen, t.num_layers
        key_share = t.num_key_value_heads / t.num_attention_heads
        self.weights = t.hidden_size**2 * (2 + 2 * key_share) + 3 * t.hidden_size * t.intermediate_size
        self.width = t.hidden_size
        self.head = t.hidden_size * t.vocab_size
        self.vision_weights = v.num_layers * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
        self.vision_weights += v.hidden_size * t.hidden_size + t.hidden_size**2
        self.vision_width = v.num_layers * v.hidden_size

    def of(self, batch: TrainingBatch) -> float:
        """Operations for one forward and backward pass of a batch."""
        sequence, total = batch.sequence, 0.0
        for spans in sequence.spans:
            cut = prefix_length(spans) if self.prefix_is_frozen else 0
            seen = 0
            for index, span in enumerate(spans):
                und, gen = span.und.stop - span.und.start, span.gen.stop - span.gen.start
                n, backward = und + gen, index >= cut
                pairs = n * seen + (n * (n + 1) / 2 if span.causal else n * n)
                total += self.layers * 4 * self.width * pairs * (3 if backward else 1)
                for tokens, expert in ((und, "und"), (gen, "gen")):
                    passes = 1 + backward + (expert in self.learning)
                    total += self.layers * 2 * self.weights * tokens * passes
                seen += 0 if span.hidden else n
        labels = int((sequence.labels >= 0).sum())
        total += 2 * self.head * labels * (2 + ("text" in self.learning))
        passes = 3 if "vision" in self.learning else 1
        total += 2 * self.vision_weights * sum(sequence.patch_lengths) * passes
        return total + 4 * self.vision_width * sum(n * n for n in sequence.patch_lengths) * passes


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product here and now: the best of a few short tries."""
    side = 4096 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
