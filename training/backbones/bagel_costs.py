"""Memory of BAGEL: of a training step and of a pipeline call, from the models' formulas for assumed inputs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from echo4o.modeling.common.images import vae_scale_factor
from echo4o.training.backbones.base import CallMemory, ImageCall, Precision, StepMemory

TEXT_TOKENS = 128  # of a prompt
REFERENCES = 1  # per training sample


class LargestSides(NamedTuple):
    """Longest image sides in pixels."""

    vae: int
    vision: int


def largest_sides(components: dict[str, Any], index: dict) -> LargestSides:
    """From the checkpoint's model_index.json, else from the position tables."""
    transformer, vision = components["transformer"].config, components["vision_model"].config
    own = [(index.get(f"{name}_image_limits") or {}).get("max_size") for name in ("vae", "vision")]
    return LargestSides(
        own[0] or transformer.max_latent_size * latent_stride(components),
        own[1] or vision.max_patches_per_side * vision.patch_size,
    )


def latent_stride(components: dict[str, Any]) -> int:
    """Pixels per latent token, per side."""
    return components["transformer"].config.latent_patch_size * vae_scale_factor(components["vae"].config)


# --- a training step ------------------------------------------------------------------------------------------------


class BagelPassTokens(NamedTuple):
    """Tokens of one forward pass of one process."""

    gen: int  # VAE tokens
    und: int  # all others, of which `patches` are vision patches
    patches: int
    samples: tuple[int, ...]  # lengths of the samples of a fixed batch


def pass_tokens(recipe: Any, components: dict[str, Any], sides: LargestSides, num_processes: int) -> BagelPassTokens:
    """A full pack, or a micro-batch of images of the largest size with one reference each."""
    latents = (sides.vae // latent_stride(components)) ** 2
    patches = REFERENCES * (sides.vision // components["vision_model"].config.patch_size) ** 2
    gen = latents * (1 + REFERENCES)
    und = patches + TEXT_TOKENS + 2 + 2 * (1 + 2 * REFERENCES)
    if recipe.packing:
        samples = recipe.packing.tokens / (gen + und)
        gen = round(gen * samples)
        return BagelPassTokens(gen, recipe.packing.tokens - gen, round(patches * samples), ())
    count = recipe.micro_batch_size or math.ceil((recipe.batch_size or 0) / num_processes)
    return BagelPassTokens(gen * count, und * count, patches * count, (gen + und,) * count)


def step_memory(
    recipe: Any, components: dict[str, Any], index: dict, num_processes: int, precision: Precision
) -> StepMemory:
    """See [`Backbone.step_memory`]."""
    sides = largest_sides(components, index)
    tokens = pass_tokens(recipe, components, sides, num_processes)
    transformer, vision, vae = components["transformer"], components["vision_model"], components["vae"]
    widths = {"compute": precision.compute, "residual": precision.residual}
    options: dict[str, Any] = widths | {
        "rank": recipe.tune.rank if recipe.tune.method == "lora" else 0,
        "masked_samples": tokens.samples if recipe.device == "cpu" else (),
    }
    checkpointing, recomputed = recipe.gradient_checkpointing, 0.0
    kept = transformer.activation_bytes(tokens.gen, tokens.und, checkpointing=checkpointing, **options)
    if checkpointing:
        recomputed = transformer.layer_activation_bytes(tokens.gen, tokens.und, **options)
    if vision.trains():
        kept += vision.activation_bytes(tokens.patches, checkpointing=checkpointing, **widths)
        if checkpointing:
            recomputed = max(recomputed, tokens.patches * vision.layer_activation_bytes(**widths))
    total = tokens.gen + tokens.und
    return StepMemory(
        activations=kept + recomputed,
        recomputed=recomputed,
        workspace=transformer.backward_workspace_bytes(total, precision.compute),
        encoding=4.0 * 4 * vae.config.block_out_channels[0] * sides.vae**2,  # about four tensors of the first level
        description=(
            f"activations: one pass over {total:,} tokens ({tokens.gen:,} VAE, {tokens.patches:,} ViT), no answers"
        ),
    )


# --- a call of the pipeline -----------------------------------------------------------------------------------------


def call_memory(components: dict[str, Any], index: dict, call: ImageCall, itemsize: int) -> CallMemory:
    """See [`Backbone.call_memory`]. Raises ValueError for a size or a number of references that is not possible."""
    transformer, vision = components["transformer"], components["vision_model"].config
    stride = latent_stride(components)
    largest = stride * transformer.config.max_latent_size
    most = index.get("max_references", 4)
    if call.references > most:
        raise ValueError(f"--references {call.references}: the model takes {most} per prompt at most")
    for name, value in (("height", call.height), ("width", call.width)):
        if value is not None and (value < stride or value % stride or value > largest):
            raise ValueError(f"--{name} {value}: sizes are multiples of {stride} from {stride} to {largest}")
    height, width = call.height or largest, call.width or largest
    branches = 3 if call.references else 2
    latents = height * width // stride**2
    # Each cache holds its context and room for the image; texts and images bring two markers each. The condition's
    # cache serves the text-free branch; the image-free branch has its own cache.
    reference = transformer.config.max_latent_size**2 + 2 + vision.max_patches_per_side**2 + 2
    context = call.text_tokens + 2 + call.references * reference + latents + 2
    context += call.text_tokens + 2 + latents + 2 if call.references else 0
    return CallMemory(
        height=height,
        width=width,
        branches=branches,
        caches=transformer.kv_cache_bytes(call.batch * context, itemsize),
        update=transformer.update_bytes(call.batch * branches * latents, itemsize),
        reference_side=largest if call.references else 0,
    )
