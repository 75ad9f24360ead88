"""Memory of OmniGen2: of a training step and of a pipeline call, from the transformer's formulas for assumed inputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from echo4o.modeling.common.images import vae_scale_factor
from echo4o.training.backbones.base import CallMemory, ImageCall, Precision, StepMemory

TEXT_TOKENS = 128  # of a prompt with its system turn
REFERENCES = 1  # per training sample
LARGEST_SIDE = 1024  # pixels of generated images and of references, as the original's limits

# Configurations of the released components; Qwen2.5-VL-3B's values are public.
RELEASE_CONFIGS: dict[str, dict] = {
    "transformer": {},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "mllm": {
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": 2048,
        },
    },
}


def latent_stride(components: dict[str, Any]) -> int:
    """Pixels per token, per side."""
    return components["transformer"].config.patch_size * vae_scale_factor(components["vae"].config)


class OmniGen2PassTokens(NamedTuple):
    """Tokens of one forward pass of one process."""

    text: int
    references: int
    targets: int

    @property
    def total(self) -> int:
        return self.text + self.references + self.targets


def pass_tokens(recipe: Any, components: dict[str, Any], num_processes: int) -> OmniGen2PassTokens:
    """A full pack, or a micro-batch of images of the largest size with one reference each."""
    area = latent_stride(components) ** 2
    targets = recipe.objective.max_output_pixels // area
    references = REFERENCES * (recipe.objective.input_pixels(REFERENCES) // area)
    one = OmniGen2PassTokens(TEXT_TOKENS, references, targets)
    if recipe.packing:
        share = recipe.packing.tokens / one.total
        return OmniGen2PassTokens(round(TEXT_TOKENS * share), round(references * share), round(targets * share))
    count = recipe.micro_batch_size or math.ceil((recipe.batch_size or 0) / num_processes)
    return OmniGen2PassTokens(TEXT_TOKENS * count, references * count, targets * count)


def step_memory(
    recipe: Any, components: dict[str, Any], index: dict, num_processes: int, precision: Precision
) -> StepMemory:
    """See [`Backbone.step_memory`]."""
    tokens = pass_tokens(recipe, components, num_processes)
    transformer, vae = components["transformer"], components["vae"]
    options: dict[str, Any] = {
        "compute": precision.compute,
        "residual": precision.residual,
        "rank": recipe.tune.rank if recipe.tune.method == "lora" else 0,
    }
    checkpointing, recomputed = recipe.gradient_checkpointing, 0.0
    kept = transformer.activation_bytes(*tokens, checkpointing=checkpointing, **options)
    if checkpointing:
        recomputed = transformer.layer_activation_bytes(tokens.total, **options)
    pixels = max(recipe.objective.max_output_pixels, *recipe.objective.max_input_pixels)
    return StepMemory(
        activations=kept + recomputed,
        recomputed=recomputed,
        workspace=transformer.backward_workspace_bytes(tokens.total, precision.compute),
        encoding=4.0 * 4 * vae.config.block_out_channels[0] * pixels,  # about four tensors of the first level
        description=(
            f"activations: one pass over {tokens.total:,} tokens ({tokens.targets:,} of targets, "
            f"{tokens.references:,} of references)"
        ),
    )


def call_memory(components: dict[str, Any], index: dict, call: ImageCall, itemsize: int) -> CallMemory:
    """See [`Backbone.call_memory`]. Raises ValueError for a size or a number of references that is not possible."""
    transformer, stride = components["transformer"], latent_stride(components)
    most = index.get("max_references", transformer.image_index_embedding.shape[0])
    if call.references > most:
        raise ValueError(f"--references {call.references}: the model takes {most} per prompt at most")
    for name, value in (("height", call.height), ("width", call.width)):
        if value is not None and value < stride:
            raise ValueError(f"--{name} {value}: sizes are {stride} pixels at least")
    height, width = call.height or LARGEST_SIDE, call.width or LARGEST_SIDE
    branches = 3 if call.references else 2
    targets, reference = height * width // stride**2, (LARGEST_SIDE // stride) ** 2
    # The branch without references is the shortest; the other two carry all of them.
    rows = branches * (call.text_tokens + targets) + (branches - 1) * call.references * reference
    hidden = transformer.config.hidden_size
    return CallMemory(
        height=height,
        width=width,
        branches=branches,
        # Refined texts and embedded references stay for all updates.
        caches=float(call.batch * (branches * call.text_tokens + call.references * reference) * hidden * itemsize),
        update=transformer.update_bytes(call.batch * rows, itemsize),
        reference_side=LARGEST_SIDE if call.references else 0,
    )
