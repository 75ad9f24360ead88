"""Checks the arguments of a call before any long computation, and brings them to one form."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..common.image_files import to_rgb
from ..common.images import to_images
from .guidance_bagel import Guidance, is_real
from .image_processor_bagel import ImageLimits

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class PromptInputs:
    """The checked inputs of one prompt.

    Args:
        items: texts and RGB images in reading order.
        height, width: pixels of the images to generate.
        guidance: of the images to generate.
    """

    items: list[str | Image.Image]
    height: int
    width: int
    guidance: Guidance


def read_prompts(prompt, image, inputs, max_references: int) -> list[list[str | Image.Image]]:
    """Texts and RGB images of every prompt in reading order, from `prompt` and `image` or from `inputs`.

    The references of a prompt precede its text. Raises ValueError for anything that is not text or an image.
    """
    if prompt is None and inputs is None and image is not None:
        raise ValueError("`image` needs a `prompt` that says what to do with it.")
    if (prompt is None) == (inputs is None):
        given = "both" if prompt is not None else "neither"
        raise ValueError(f"Give either `prompt` (with `image`) or `inputs`; got {given}.")
    if inputs is not None:
        if image is not None:
            raise ValueError("`image` belongs to `prompt`; with `inputs`, put the images into the list.")
        conversations = _read_inputs(_as_images(inputs, "`inputs`"))
    else:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not prompts:
            raise ValueError(f"`prompt` must be a string or a non-empty list of strings, got {prompt!r}.")
        image = _as_images(image, "`image`")
        references = _read_references(image, len(prompts), single=isinstance(prompt, str))
        conversations = [[*images, text] for images, text in zip(references, prompts, strict=True)]
    return [_check_items(items, index, max_references) for index, items in enumerate(conversations)]


def _as_images(value, place: str):
    """The value with its arrays and tensors as PIL images; a batch of them is a list."""
    if isinstance(value, (list, tuple)):
        return type(value)(_as_images(item, place) for item in value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        images = to_images(value, place)
        return images if value.ndim == 4 else images[0]
    return value


def _read_inputs(inputs) -> list[list]:
    if not isinstance(inputs, list) or not inputs:
        raise ValueError(f"`inputs` must be a non-empty list of strings and images, got {inputs!r}.")
    nested = [isinstance(item, list) for item in inputs]
    if any(nested) and not all(nested):
        raise ValueError("`inputs` mixes lists with items: give one interleaved list, or a list of such lists.")
    return inputs if all(nested) else [inputs]


def _read_references(image, prompts: int, single: bool) -> list[list]:
    if image is None:
        return [[] for _ in range(prompts)]
    if single:
        images = image if isinstance(image, (list, tuple)) else [image]
        if len(images) == 1 and isinstance(images[0], (list, tuple)):
            images = images[0]
        return [_check_references(images, 0)]
    if not isinstance(image, (list, tuple)) or len(image) != prompts:
        given = f"{len(image)} entries" if isinstance(image, (list, tuple)) else f"one {type(image).__name__}"
        raise ValueError(
            f"`prompt` lists {prompts} prompts but `image` has {given}: give one image, list of images or None "
            "for each prompt."
        )
    groups = [[] if i is None else i if isinstance(i, (list, tuple)) else [i] for i in image]
    return [_check_references(group, index) for index, group in enumerate(groups)]


def _check_references(images: Sequence, index: int) -> list[Image.Image]:
    """The reference images of one prompt. Raises ValueError for anything else."""
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"`image` of prompt {index} holds a {type(image).__name__} ({image!r:.60}); give images, opened with "
                "PIL.Image.open."
            )
    return list(images)


def _check_items(items: list, index: int, max_references: int) -> list[str | Image.Image]:
    if not items:
        raise ValueError(f"Prompt {index} is empty: give at least one text or image.")
    checked, images = [], 0
    for item in items:
        if isinstance(item, str):
            if not item.strip():
                raise ValueError(f"Prompt {index} has an empty text ({item!r}); describe the image or leave it out.")
            checked.append(_check_text(item, index))
            continue
        if not isinstance(item, Image.Image):
            raise ValueError(f"Prompt {index} has a {type(item).__name__}; texts are str and images PIL.Image.")
        checked.append(to_rgb(item, f"image {images} of prompt {index}"))
        images += 1
    if images > max_references:
        raise ValueError(
            f"Prompt {index} has {images} reference images; this checkpoint is configured for at most "
            f"{max_references} (`max_references` in model_index.json)."
        )
    return checked


def _check_text(text: str, index: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"Prompt {index} is not valid Unicode text: {error}.") from error
    return text


def read_size(value, name: str, prompts: int, multiple: int, largest: int) -> list[int | None]:
    """`height` or `width` as one value per prompt; every size a multiple of `multiple` and at most `largest`."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * prompts
    if len(values) != prompts:
        raise ValueError(f"`{name}` lists {len(values)} sizes for {prompts} prompts.")
    for v in values:
        if v is not None and (not is_integer(v) or v < multiple or v % multiple or v > largest):
            raise ValueError(
                f"{name}={v!r} is not possible: sizes are multiples of {multiple} from {multiple} to {largest} "
                "(the end of the latent position table)."
            )
    return [None if v is None else int(v) for v in values]


GUIDANCE_OPTIONS = ("guidance_scale", "image_guidance_scale", "guidance_interval", "guidance_renorm")


def read_guidance(options: dict, presets: dict, items: list, index: int) -> Guidance:
    """The guidance of one prompt: the call's arguments, completed by the preset of the task.

    Args:
        options: guidance arguments by name; None: the preset's value.
        presets: of the checkpoint, by task ("text_to_image", "with_references").

    Raises:
        ValueError: image guidance without a reference image, or without text guidance, where it has no effect.
    """
    has_images = any(not isinstance(item, str) for item in items)
    preset = presets["with_references" if has_images else "text_to_image"]
    chosen = [preset[name] if options[name] is None else options[name] for name in GUIDANCE_OPTIONS]
    guidance = Guidance.checked(*chosen, renorm_min=options["guidance_renorm_min"])
    if options["image_guidance_scale"] is not None and guidance.image_scale > 1:
        if not has_images:
            raise ValueError(
                f"image_guidance_scale={guidance.image_scale} needs a reference image, and prompt {index} has none: "
                "the image-free branch cannot be built. Leave it out or set it to 1."
            )
        if guidance.scale <= 1:
            raise ValueError(
                f"image_guidance_scale={guidance.image_scale} has no effect with guidance_scale={guidance.scale}: "
                "BAGEL applies image guidance only on top of text guidance (above 1)."
            )
    return guidance


def read_prompt_inputs(
    prompts: list[list], height, width, options: dict, *, presets: dict, limits: ImageLimits, largest: int
) -> list[PromptInputs]:
    """Complete every prompt by size and guidance. The default size is that of the last reference image, or else the
    largest square."""
    heights = read_size(height, "height", len(prompts), limits.stride, largest)
    widths = read_size(width, "width", len(prompts), limits.stride, largest)
    checked = []
    for index, (items, h, w) in enumerate(zip(prompts, heights, widths, strict=True)):
        images = [item for item in items if not isinstance(item, str)]
        default_w, default_h = limits.size(*images[-1].size) if images else (limits.max_size, limits.max_size)
        guidance = read_guidance(options, presets, items, index)
        checked.append(PromptInputs(items, h or default_h, w or default_w, guidance))
    return checked


def read_generators(generator, images: int) -> list[torch.Generator | None]:
    """One generator per image; a single generator is used for all images in turn."""
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * images
    if len(generators) != images:
        raise ValueError(f"`generator` lists {len(generators)} generators for {images} images: give one for each.")
    for g in generators:
        if g is not None and not isinstance(g, torch.Generator):
            raise ValueError(f"`generator` holds a {type(g).__name__}; give torch.Generator objects.")
    return generators


def read_latents(latents, shapes: list[tuple[int, int, int]]) -> list[torch.Tensor] | None:
    """Initial noise as one (C, H/8, W/8) tensor per image; None without `latents`.

    Raises ValueError unless the shapes are `shapes` and all values are finite.
    """
    if latents is None:
        return None
    if not isinstance(latents, (torch.Tensor, list, tuple)) or any(not isinstance(x, torch.Tensor) for x in latents):
        raise ValueError(
            f"`latents` is a {type(latents).__name__}; give a tensor (B, C, H/8, W/8) or a list of tensors."
        )
    given = list(latents)
    if len(given) != len(shapes):
        raise ValueError(f"`latents` holds {len(given)} tensors for {len(shapes)} images.")
    for index, (noise, shape) in enumerate(zip(given, shapes, strict=True)):
        if tuple(noise.shape) != shape:
            raise ValueError(f"`latents` of image {index} has shape {tuple(noise.shape)}; it must be {shape}.")
        if not torch.isfinite(noise).all():
            raise ValueError(f"`latents` of image {index} holds values that are not finite.")
    return given


def read_sigmas(sigmas, timesteps, steps: int, train_timesteps: int = 1000) -> list[float]:
    """The times of the updates before the scheduler's shift, from 1 (noise) downwards; by default `steps` equal ones.

    Args:
        sigmas: given times in (0, 1], decreasing.
        timesteps: the same, times `train_timesteps`.
    """
    if sigmas is None and timesteps is None:
        return [float(t) for t in np.linspace(1.0, 0.0, steps + 1)[:-1]]
    if sigmas is not None and timesteps is not None:
        raise ValueError("Give either `sigmas` or `timesteps`, not both.")
    name, given, scale = ("sigmas", sigmas, 1) if timesteps is None else ("timesteps", timesteps, train_timesteps)
    values = given.tolist() if isinstance(given, (np.ndarray, torch.Tensor)) else given
    if not isinstance(values, (list, tuple)) or not values or not all(is_real(v) for v in values):
        raise ValueError(f"`{name}` must be a non-empty list of numbers, got {given!r:.80}.")
    times = [float(v) / scale for v in values]
    if not all(0 < t <= 1 for t in times) or any(b >= a for a, b in zip(times, times[1:])):
        raise ValueError(
            f"`{name}` must decrease within (0, {scale}] (the last update ends at 0), got {values!r:.80}."
        )
    return times


def check_components(**components) -> None:
    """Raise ValueError naming a component that is absent, or a VAE that does not fit the transformer."""
    for name, component in components.items():
        if component is None:
            raise ValueError(f"The pipeline has no {name} ({name}=None), which it needs here.")
    transformer, vae = components["transformer"], components["vae"]
    vae = getattr(vae, "_orig_mod", vae)
    name, config = type(vae).__name__, vae.config
    if "AutoencoderKL" not in {c.__name__ for c in type(vae).__mro__}:
        raise ValueError(f"The VAE is a {name}; BAGEL needs an AutoencoderKL, as in the checkpoint.")
    channels = transformer.config.latent_channels
    if config.latent_channels != channels:
        raise ValueError(f"The VAE has {config.latent_channels} latent channels, and the transformer {channels}.")
    for option in ("scaling_factor", "shift_factor"):
        if not is_real(config.get(option)):
            raise ValueError(
                f"The VAE's {option} is {config.get(option)!r}; it must be a number (release: 0.3611, 0.1159)."
            )
    if getattr(vae, "encoder", None) is None or getattr(vae, "decoder", None) is None:
        raise ValueError(f"The VAE ({name}) lacks its encoder or its decoder; the pipeline needs both.")


def check_negative_prompt(negative_prompt) -> None:
    """Raise ValueError for a negative prompt other than None and an empty text."""
    if negative_prompt is not None and negative_prompt != "":
        raise ValueError(
            "negative_prompt is not supported: BAGEL's guidance compares with the same inputs without their last text, "
            "and was not trained with another one. Describe what the image should show instead."
        )


def check_settings(*, do_sample: bool, temperature: float, output_type: str = "pil", **counts: int) -> None:
    """Check the arguments that depend neither on the prompt nor on the checkpoint; `counts` are integers from 1."""
    for name, value in counts.items():
        if not is_integer(value) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    usable = is_real(temperature) and math.isfinite(temperature) and temperature >= 1e-3
    if do_sample and not usable:
        raise ValueError(
            f"temperature={temperature!r} must be at least 0.001 to sample; for greedy text use do_sample=False."
        )
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")


def is_integer(value: Any) -> bool:
    """Whether a value is an integer, of Python or numpy."""
    return isinstance(value, numbers.Integral)
