"""Arithmetic and memory of BLIP3-o: of a training step and of a pipeline call, for assumed inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from echo4o.modeling.common.images import vae_scale_factor
from echo4o.training.backbones.base import CallMemory, ImageCall, Precision, StepMemory

TEXT_TOKENS = 128  # of a prompt with its template
DEFAULT_SIDE = 1024  # pixels of an image whose size is not given
UNET_TENSORS = 16  # of the UNet's first level that are alive at once while it computes; assumed


def language_weights(config: Any) -> int:
    """Values of the matrices in the language model's layers."""
    text = config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    attention = 2 * text.hidden_size * (text.num_attention_heads + text.num_key_value_heads) * head_dim
    return text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def language_flops(config: Any, lengths: Sequence[int]) -> float:
    """Floating point operations of a forward pass, and of a backward pass to the inputs of frozen weights."""
    text = config.text_config
    attention = 2.0 * text.num_hidden_layers * text.hidden_size * sum(n * n for n in lengths)  # causal
    return 2 * (2.0 * language_weights(config) * sum(lengths) + attention)


def language_layer_bytes(config: Any, itemsize: int) -> float:
    """Bytes that one frozen layer keeps per token for the backward pass to its input."""
    text = config.text_config
    kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return (5 * text.hidden_size + 3 * kv + 3 * text.intermediate_size) * itemsize


def step_memory(
    recipe: Any, components: dict[str, Any], index: dict, num_processes: int, precision: Precision
) -> StepMemory:
    """See [`Backbone.step_memory`]."""
    head, vision = components["transformer"], components["vision_model"].config
    images, tokens = images_of(recipe, head, num_processes)
    compute, checkpointing = precision.compute, recipe.gradient_checkpointing
    kept = head.activation_bytes(images, compute, precision.residual, checkpointing)
    recomputed = images * head.layer_activation_bytes(compute, precision.residual) if checkpointing else 0.0
    workspace = 3.0 * images * head.num_tokens * head.config.ffn_dim * compute
    if recipe.trains_queries:
        config = components["language_model"].config
        layer = tokens * language_layer_bytes(config, compute)
        layers, hidden = config.text_config.num_hidden_layers, config.text_config.hidden_size
        kept += layers * tokens * hidden * compute if checkpointing else layers * layer
        recomputed = max(recomputed, layer) if checkpointing else 0.0
        workspace = max(workspace, 3.0 * tokens * config.text_config.intermediate_size * compute)
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    encoding = 0.0 if recipe.latents else 4.0 * patches * (vision.intermediate_size + 4 * vision.hidden_size)
    read = f" and {tokens:,} tokens of the language model" if recipe.trains_queries else ""
    return StepMemory(
        activations=kept + recomputed,
        recomputed=recomputed,
        workspace=workspace,
        encoding=encoding,
        description=f"activations: one pass over {images:,} images{read}",
    )


def images_of(recipe: Any, head: Any, num_processes: int) -> tuple[int, int]:
    """Images of one forward pass of one process, and the language model's tokens for them."""
    text = TEXT_TOKENS + head.config.num_queries if recipe.trains_queries else 0
    if recipe.packing:
        one = head.num_tokens + head.config.num_queries + (TEXT_TOKENS if recipe.trains_queries else 0)
        images = max(1, recipe.packing.tokens // one)
    else:
        images = recipe.micro_batch_size or math.ceil((recipe.batch_size or 0) / num_processes)
    return images, images * text


def call_memory(components: dict[str, Any], index: dict, call: ImageCall, itemsize: int) -> CallMemory:
    """See [`Backbone.call_memory`]. Raises ValueError for references and for impossible sizes."""
    if call.references:
        raise ValueError(f"--references {call.references}: BLIP3-o generates from text only; use --references 0")
    unet, head = components["unet"].config, components["transformer"].config
    stride = vae_scale_factor(components["vae"].config)
    default = index.get("default_size", DEFAULT_SIDE)
    for name, value in (("height", call.height), ("width", call.width)):
        if value is not None and value < stride:
            raise ValueError(f"--{name} {value}: sizes are {stride} pixels at least")
    height, width = call.height or default, call.width or default
    branches = 2
    level = height // stride * (width // stride) * unet.block_out_channels[0]
    features = head.num_queries * (head.condition_dim + head.in_channels)
    return CallMemory(
        height=height,
        width=width,
        branches=branches,
        caches=float(call.batch * branches * features * 4),
        update=float(UNET_TENSORS * call.batch * branches * level * itemsize),
        reference_side=0,
    )
