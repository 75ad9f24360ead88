"""Arguments of a call, checked before any long work and brought to one form: a request per prompt."""

import copy
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..common.image_files import to_rgb
from .sampling_omnigen2 import OmniGen2Guidance

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DEFAULT_SIZE = 1024  # pixels, without a reference that sets the size
# Text to image: the defaults of the original's call. With references: those of its scripts.
PRESETS = {
    "text_to_image": {"guidance_scale": 4.0, "image_guidance_scale": 1.0, "guidance_range": [0.0, 1.0]},
    "with_references": {"guidance_scale": 5.0, "image_guidance_scale": 2.0, "guidance_range": [0.0, 1.0]},
}

GUIDANCE_OPTIONS = ("guidance_scale", "image_guidance_scale", "guidance_range")


@dataclass(frozen=True)
class Request:
    """A prompt with its references (RGB), its size in pixels (None: not given) and its guidance."""

    prompt: str
    negative_prompt: str
    references: list[Image.Image]
    height: int | None
    width: int | None
    takes_reference_size: bool
    guidance: OmniGen2Guidance


def read_presets(presets: dict | None) -> dict:
    """Presets as they are registered. Raises ValueError naming what is wrong."""
    presets = PRESETS if presets is None else presets
    _check_keys("presets", presets, PRESETS)
    for task, preset in presets.items():
        _check_keys(f"presets[{task!r}]", preset, PRESETS[task])
        OmniGen2Guidance.checked(*(preset[name] for name in GUIDANCE_OPTIONS))
    return copy.deepcopy(presets)


def _check_keys(name: str, value, wanted: dict) -> None:
    if not isinstance(value, dict) or set(value) != set(wanted):
        given = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{name} holds {given!r}; it must have exactly the keys {', '.join(wanted)}.")


def read_requests(
    prompt,
    negative_prompt,
    image,
    height,
    width,
    options: dict,
    *,
    presets: dict,
    max_references: int,
    align_res: bool,
) -> list[Request]:
    """One request per prompt.

    Args:
        options: `guidance_scale`, `image_guidance_scale`, `guidance_range`; None takes the preset's value.
        align_res: one prompt with exactly one reference takes the reference's size.
    """
    is_single = isinstance(prompt, str)
    prompts = [prompt] if is_single else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or any(not isinstance(p, str) for p in prompts):
        raise ValueError(f"`prompt` must be a string or a non-empty list of strings, got {prompt!r:.100}.")
    for index, text in enumerate(prompts):
        _check_text(text, f"prompt {index}")
    groups, is_flat = _read_references(image, len(prompts))
    heights, widths = (
        _per_prompt(value, name, len(prompts)) for value, name in ((height, "height"), (width, "width"))
    )
    requests = []
    for index, (text, negative, images, h, w) in enumerate(
        zip(prompts, _read_negative(negative_prompt, len(prompts)), groups, heights, widths, strict=True)
    ):
        if len(images) > max_references:
            raise ValueError(f"Prompt {index} has {len(images)} references; the model takes at most {max_references}.")
        rgb = [to_rgb(x, f"reference {i} of prompt {index}") for i, x in enumerate(images)]
        preset = presets["with_references" if rgb else "text_to_image"]
        chosen = [preset[n] if options[n] is None else options[n] for n in GUIDANCE_OPTIONS]
        is_given = is_flat and len(prompts) == 1
        aligned = len(rgb) == 1 and align_res and (is_given or (h is None and w is None))
        requests.append(Request(text, negative, rgb, h, w, aligned, OmniGen2Guidance.checked(*chosen)))
    return requests


def _read_negative(negative_prompt, prompts: int) -> list[str]:
    values = negative_prompt if isinstance(negative_prompt, (list, tuple)) else [negative_prompt] * prompts
    if len(values) != prompts:
        raise ValueError(f"`negative_prompt` lists {len(values)} texts for {prompts} prompts: give one or {prompts}.")
    for index, value in enumerate(values):
        if value is not None:
            _check_text(value, f"negative prompt {index}")
    return ["" if value is None else value for value in values]


def _check_text(text, place: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{place} is a {type(text).__name__}; give a string.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not valid Unicode text: {error}.") from error


def _read_references(image, prompts: int) -> tuple[list[list], bool]:
    """Images of each prompt, and whether they were given as those of the only prompt."""
    if image is None or (isinstance(image, (list, tuple)) and not image):
        return [[] for _ in range(prompts)], True
    if isinstance(image, Image.Image):
        image = [image]
    if not isinstance(image, (list, tuple)):
        raise ValueError(f"`image` is a {type(image).__name__}; give PIL images (open files with PIL.Image.open).")
    if prompts == 1 and not any(isinstance(x, (list, tuple)) or x is None for x in image):
        return [list(image)], True
    if len(image) != prompts:
        raise ValueError(
            f"`prompt` lists {prompts} prompts but `image` has {len(image)} entries: give one image, list of images "
            "or None for each prompt."
        )
    return [[] if x is None else list(x) if isinstance(x, (list, tuple)) else [x] for x in image], False


def _per_prompt(value, name: str, prompts: int) -> list[int | None]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * prompts
    if len(values) != prompts:
        raise ValueError(f"`{name}` lists {len(values)} sizes for {prompts} prompts.")
    for size in values:
        if size is not None and (not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name}={size!r} must be a whole number of pixels above 0.")
    return [None if size is None else int(size) for size in values]


def read_generators(generator, images: int) -> list[torch.Generator | None]:
    """One generator per image; a single one serves all images in turn."""
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * images
    if len(generators) != images:
        raise ValueError(f"`generator` lists {len(generators)} generators for {images} images: give one for each.")
    for g in generators:
        if g is not None and not isinstance(g, torch.Generator):
            raise ValueError(f"`generator` holds a {type(g).__name__}; give torch.Generator objects.")
    return generators


def read_latents(latents, images: int, channels: int, patch: int) -> list[torch.Tensor] | None:
    """Initial noise as one (C, h, w) tensor per image. Their sizes decide at which size is generated."""
    if latents is None:
        return None
    if not isinstance(latents, (torch.Tensor, list, tuple)) or any(not isinstance(x, torch.Tensor) for x in latents):
        raise ValueError(f"`latents` is a {type(latents).__name__}; give a tensor (B, C, h, w) or a list of tensors.")
    given = list(latents)
    if len(given) != images:
        raise ValueError(f"`latents` holds {len(given)} noises for {images} images.")
    for index, noise in enumerate(given):
        if noise.ndim != 3 or noise.shape[0] != channels or noise.shape[1] % patch or noise.shape[2] % patch:
            raise ValueError(
                f"`latents` of image {index} has shape {tuple(noise.shape)}; it must be ({channels}, h, w) with h and w "
                f"multiples of {patch}."
            )
        if not torch.isfinite(noise).all():
            raise ValueError(f"`latents` of image {index} holds values that are not finite.")
    return given


def read_times(timesteps: Sequence[float] | None) -> list[float] | None:
    """Times of the updates, rising from 0 (noise) and below 1 (data)."""
    if timesteps is None:
        return None
    times = [float(time) for time in timesteps]
    is_rising = all(a < b for a, b in zip(times, times[1:]))
    if not times or not is_rising or not 0 <= times[0] or not times[-1] < 1:
        raise ValueError(f"timesteps={times} must rise, from 0 (noise) at least and below 1 (data).")
    return times


def check_settings(*, output_type: str = "pil", max_sequence_length: int | None = None, **counts: int) -> None:
    """Raise ValueError for an unknown output type, or for a count that is not a whole number above 0."""
    if max_sequence_length is not None:
        counts["max_sequence_length"] = max_sequence_length
    for name, value in counts.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")


def check_sampling(do_sample: bool, temperature: float) -> None:
    """Raise ValueError for a temperature at which text cannot be sampled."""
    is_usable = isinstance(temperature, numbers.Real) and math.isfinite(temperature) and temperature >= 1e-3
    if do_sample and not is_usable:
        raise ValueError(f"temperature={temperature!r} must be at least 0.001 to sample; else use do_sample=False.")
