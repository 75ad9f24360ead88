"""What a training step keeps in memory between its forward and its backward pass, from the model's sizes.

One line per kind of tensor, for the operations of `modeling/bagel` as autograd runs them; a test compares the sums with
what `saved_tensors_hooks` sees. Nothing here allocates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Learning = Literal["full", "lora", "frozen"]  # its weights, an adapter beside them, or nothing


@dataclass(frozen=True)
class Load:
    """One forward pass. `gen`: VAE tokens, `und`: all others, of which `patches` are vision patches."""

    gen: int
    und: int
    patches: int = 0
    labels: int = 0  # text tokens with a loss
    samples: tuple[int, ...] = ()  # their lengths; only attention under a stored mask (CPU) depends on them

    @property
    def tokens(self) -> int:
        return self.gen + self.und


@dataclass(frozen=True)
class Precision:
    """Bytes per value of what is computed.

    Args:
        compute: inputs of matrix products and attention.
        residual: the stream between layers; wider than `compute` where float32 weights run under autocast.
    """

    compute: int = 4
    residual: int = 4


def expert_bytes(config, learning: Learning, precision: Precision, rank: int = 0) -> float:
    """Kept per token by one expert in one layer, its part of the attention included."""
    h, f, heads, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    k = h * kv // heads
    b = precision.compute
    cast = b < 4  # autocast and PEFT cast the inputs of matrix products one by one
    full, lora = learning == "full", learning == "lora"
    # Norms compute in float32 and keep their inputs so (a fused CUDA kernel may keep less).
    kept = 4.0 * (2 * h + 2)  # inputs of both norms and their scales
    kept += 4 * (h + k + heads + kv)  # queries and keys before their norms, the norms' scales
    kept += (h + 2 * k) * b + 4 * heads + h * b  # attention: queries, keys, values, log-sums, result
    kept += 3 * f * b  # gate, its activation, up
    if full:
        kept += 4 * (3 * h + k)  # normalised, for the gradients of the norms' weights
        kept += 5 * h * b if cast else 2 * h * b  # inputs of q, k, v and of gate, up
        kept += h * b + f * b  # inputs of out and down
    if lora:
        inputs = 5 * h if cast else 2 * h
        kept += (inputs + h + f) * b + 7 * rank * b
    return kept


def layer_bytes(
    config, load: Load, learning: dict[str, Learning], precision: Precision, rank: int = 0, stored_masks: bool = False
) -> float:
    """Kept by one layer. `stored_masks`: attention runs sample by sample under a stored mask (CPU)."""
    kept = load.gen * expert_bytes(config, learning["gen"], precision, rank)
    kept += load.und * expert_bytes(config, learning["und"], precision, rank)
    return kept + (sum(n * n for n in load.samples) * precision.compute if stored_masks else 0)


def transformer_bytes(
    config,
    load: Load,
    learning: dict[str, Learning],
    precision: Precision,
    *,
    checkpointing: bool = False,
    rank: int = 0,
    stored_masks: bool = False,
) -> float:
    """Kept by the transformer. `learning` has the keys gen and und.

    With checkpointing: the inputs of every layer. The layer that is computed again comes on top ([`layer_bytes`]).
    """
    if all(how == "frozen" for how in learning.values()):
        return 0.0
    h, r, b = config.hidden_size, precision.residual, precision.compute
    if checkpointing:
        kept = config.num_layers * load.tokens * h * r
    else:
        kept = config.num_layers * layer_bytes(config, load, learning, precision, rank, stored_masks)
    kept += load.tokens * 4 * (h + 1)  # inputs of the last norms
    kept += load.tokens * 2 * r * h // config.num_attention_heads  # rotary angles
    if learning["gen"] == "full":
        kept += load.gen * (256 + 3 * h) * b  # time embedding
        kept += load.gen * h * (4 + b)  # normalised, and the input of the velocity's projection
    if learning["und"] == "full":
        kept += load.und * 4 * h
    return kept + load.labels * config.vocab_size * (b + 3 * 4)  # logits, in float32, their softmax, their gradient


def vision_bytes(config, patches: int, precision: Precision, checkpointing: bool = False) -> float:
    """Kept by the vision tower and its connector when they learn; with checkpointing, all but one layer."""
    w, out, r, b = config.hidden_size, config.output_size, precision.residual, precision.compute
    kept = config.num_layers * (w * r if checkpointing else vision_layer_bytes(config, precision))
    return patches * (kept + w * r + w * b + 2 * out * b + config.patch_size**2 * config.num_channels * b)


def vision_layer_bytes(config, precision: Precision) -> float:
    """Kept per patch by one layer of the vision tower."""
    w, r, b = config.hidden_size, precision.residual, precision.compute
    inputs = 4 if b < 4 else 2  # of q, k, v and of the MLP: cast one by one, or shared
    return 2 * w * r + (inputs + 5) * w * b + 2 * config.intermediate_size * b


def backward_workspace(config, tokens: int, precision: Precision) -> float:
    """Gradients that are alive at once inside the widest operation: those of an MLP's three inner tensors."""
    return 3.0 * tokens * config.intermediate_size * precision.compute
