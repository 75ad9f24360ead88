"""What a caller may ask of the pipeline, checked before any long work and turned into one form: a list of requests."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..common.image_files import to_rgb
from .guidance_bagel import Guidance
from .image_processor_bagel import ImageLimits

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Request:
    """One prompt in its general form: texts and RGB pictures in reading order, and what to draw after them."""

    items: list[str | Image.Image]
    height: int = 0
    width: int = 0
    guidance: Guidance | None = None

    @property
    def pictures(self) -> list[Image.Image]:
        return [item for item in self.items if not isinstance(item, str)]


def read_items(prompt, image, inputs, max_references: int) -> list[list[str | Image.Image]]:
    """Bring `prompt` and `image`, or `inputs`, to one list of items per prompt: references first, then the text."""
    if prompt is None and inputs is None and image is not None:
        raise ValueError("`image` needs a `prompt` that says what to do with it.")
    if (prompt is None) == (inputs is None):
        given = "both" if prompt is not None else "neither"
        raise ValueError(f"Give either `prompt` (with `image`) or `inputs`; got {given}.")
    if inputs is not None:
        if image is not None:
            raise ValueError("`image` belongs to `prompt`; with `inputs`, put the pictures into the list.")
        conversations = _read_inputs(inputs)
    else:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, Sequence) or not prompts:
            raise ValueError(f"`prompt` must be a string or a non-empty list of strings, got {prompt!r}.")
        references = _read_references(image, len(prompts), single=isinstance(prompt, str))
        conversations = [[*images, text] for images, text in zip(references, prompts, strict=True)]
    return [_check_items(items, index, max_references) for index, items in enumerate(conversations)]


def _read_inputs(inputs) -> list[list]:
    if not isinstance(inputs, list) or not inputs:
        raise ValueError(f"`inputs` must be a non-empty list of strings and pictures, got {inputs!r}.")
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
            f"`prompt` lists {prompts} prompts but `image` has {given}: give one picture, list of pictures or None "
            "for each prompt."
        )
    groups = [[] if i is None else i if isinstance(i, (list, tuple)) else [i] for i in image]
    return [_check_references(group, index) for index, group in enumerate(groups)]


def _check_references(images: Sequence, index: int) -> list[Image.Image]:
    """A text here would be read as part of the prompt."""
    for image in images:
        if not isinstance(image, Image.Image):
            raise ValueError(
                f"`image` of prompt {index} holds a {type(image).__name__} ({image!r:.60}); give pictures, opened with "
                "PIL.Image.open."
            )
    return list(images)


def _check_items(items: list, index: int, max_references: int) -> list[str | Image.Image]:
    if not items:
        raise ValueError(f"Prompt {index} is empty: give at least one text or picture.")
    checked, pictures = [], 0
    for item in items:
        if isinstance(item, str):
            if not item.strip():
                raise ValueError(f"Prompt {index} has an empty text ({item!r}); say what to draw or leave it out.")
            checked.append(_check_text(item, index))
            continue
        if not isinstance(item, Image.Image):
            raise ValueError(f"Prompt {index} has a {type(item).__name__}; texts are str and pictures PIL.Image.")
        checked.append(to_rgb(item, f"picture {pictures} of prompt {index}"))
        pictures += 1
    if pictures > max_references:
        raise ValueError(
            f"Prompt {index} has {pictures} reference pictures; this checkpoint is configured for at most "
            f"{max_references} (`max_references` in model_index.json)."
        )
    return checked


def _check_text(text: str, index: int) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"Prompt {index} is no valid Unicode text: {error}.") from error
    return text


def read_size(value, name: str, prompts: int, multiple: int, largest: int) -> list[int | None]:
    """`height` or `width` as one value per prompt; every size a multiple of `multiple` and at most `largest`."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * prompts
    if len(values) != prompts:
        raise ValueError(f"`{name}` lists {len(values)} sizes for {prompts} prompts.")
    for v in values:
        if v is not None and (not isinstance(v, numbers.Integral) or v < multiple or v % multiple or v > largest):
            raise ValueError(
                f"{name}={v!r} is not possible: sizes are multiples of {multiple} from {multiple} to {largest} "
                "(the end of the latent position table)."
            )
    return [None if v is None else int(v) for v in values]


GUIDANCE_OPTIONS = ("guidance_scale", "image_guidance_scale", "guidance_interval", "guidance_renorm")


def read_guidance(options: dict, presets: dict, items: list, index: int) -> Guidance:
    """Fill what the caller left open from the task's preset; refuse branches that cannot be built or have no effect.

    Args:
        options: the call's guidance arguments by name; None takes the preset's value.
        presets: of the checkpoint, by task ("text_to_image", "with_references").
    """
    has_pictures = any(not isinstance(item, str) for item in items)
    preset = presets["with_references" if has_pictures else "text_to_image"]
    chosen = (preset[name] if options[name] is None else options[name] for name in GUIDANCE_OPTIONS)
    guidance = Guidance.checked(*chosen, options["guidance_renorm_min"])
    if options["image_guidance_scale"] is not None and guidance.image_scale > 1:
        if not has_pictures:
            raise ValueError(
                f"image_guidance_scale={guidance.image_scale} needs a reference picture, and prompt {index} has none: "
                "the image-free branch cannot be built. Leave it out or set it to 1."
            )
        if guidance.scale <= 1:
            raise ValueError(
                f"image_guidance_scale={guidance.image_scale} has no effect with guidance_scale={guidance.scale}: "
                "BAGEL guides by pictures only on top of text guidance (above 1)."
            )
    return guidance


def read_requests(
    conversations: list[list], height, width, options: dict, *, presets: dict, limits: ImageLimits, largest: int
) -> list[Request]:
    """Size and guidance of every prompt. Without a size: that of the last reference, else the largest square."""
    heights = read_size(height, "height", len(conversations), limits.stride, largest)
    widths = read_size(width, "width", len(conversations), limits.stride, largest)
    requests = []
    for index, (items, h, w) in enumerate(zip(conversations, heights, widths, strict=True)):
        pictures = [item for item in items if not isinstance(item, str)]
        default_w, default_h = limits.size(*pictures[-1].size) if pictures else (limits.max_size, limits.max_size)
        guidance = read_guidance(options, presets, items, index)
        requests.append(Request(items, h or default_h, w or default_w, guidance))
    return requests


def read_generators(generator, pictures: int) -> list[torch.Generator | None]:
    """One generator per picture; a single one serves all pictures in turn."""
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * pictures
    if len(generators) != pictures:
        raise ValueError(f"`generator` lists {len(generators)} generators for {pictures} pictures: give one for each.")
    for g in generators:
        if g is not None and not isinstance(g, torch.Generator):
            raise ValueError(f"`generator` holds a {type(g).__name__}; give torch.Generator objects.")
    return generators


def read_latents(latents, shapes: list[tuple[int, int, int]]) -> list[torch.Tensor] | None:
    """Initial noise as one (C, H/8, W/8) tensor per picture, checked against what will be drawn."""
    if latents is None:
        return None
    if not isinstance(latents, (torch.Tensor, list, tuple)) or any(not isinstance(x, torch.Tensor) for x in latents):
        raise ValueError(
            f"`latents` is a {type(latents).__name__}; give a tensor (B, C, H/8, W/8) or a list of tensors."
        )
    given = list(latents)
    if len(given) != len(shapes):
        raise ValueError(f"`latents` holds {len(given)} noises for {len(shapes)} pictures.")
    for index, (noise, shape) in enumerate(zip(given, shapes, strict=True)):
        if tuple(noise.shape) != shape:
            raise ValueError(f"`latents` of picture {index} has shape {tuple(noise.shape)}; it must be {shape}.")
        if not torch.isfinite(noise).all():
            raise ValueError(f"`latents` of picture {index} holds values that are not finite.")
    return given


def check_settings(*, do_sample: bool, temperature: float, output_type: str = "pil", **counts: int) -> None:
    """Checks that need neither prompt nor checkpoint; every one of `counts` is a whole number of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    usable = isinstance(temperature, numbers.Real) and math.isfinite(temperature) and temperature >= 1e-3
    if do_sample and not usable:
        raise ValueError(
            f"temperature={temperature!r} must be at least 0.001 to sample; for greedy text use do_sample=False."
        )
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")
