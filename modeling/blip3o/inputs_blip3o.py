"""Checks the arguments of the pipeline's calls, before any computation."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ..common.image_files import to_rgb

OUTPUT_TYPES = ("pil", "np", "pt", "latent", "features")


def read_prompts(prompt: Any, name: str = "prompt") -> list[str]:
    """One text or a list of texts. Raises ValueError for anything else and for an empty list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"{name}={prompt!r} must be a text or a list of texts.")
    return list(prompts)


def read_images(image: Any) -> list[Image.Image]:
    """One image or a list of images, in RGB, upright, on white where they are transparent."""
    images = image if isinstance(image, (list, tuple)) else [image]
    if not images:
        raise ValueError("image is an empty list; give at least one image.")
    return [to_rgb(one, f"image {number}" if len(images) > 1 else "image") for number, one in enumerate(images)]


def read_chats(prompt: Any, image: Any) -> list[tuple[str, list[Image.Image]]]:
    """Questions, each with its images: `image` is None, an image, a list of images (one question), or one entry (an
    image, a list or None) for each question of a list."""
    prompts = read_prompts(prompt)
    entries = [image] if isinstance(prompt, str) else ([None] * len(prompts) if image is None else image)
    if not isinstance(entries, (list, tuple)) or len(entries) != len(prompts):
        raise ValueError(f"image must have one entry for each of the {len(prompts)} prompts.")
    return [(text, [] if e is None or e == [] else read_images(e)) for text, e in zip(prompts, entries, strict=True)]


def check_whole_numbers(**values: Any) -> None:
    """Raise ValueError for an argument that is not a whole number above 0."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number above 0.")


def check_numbers(**values: Any) -> None:
    """Raise ValueError for an argument that is not a finite number of at least 0."""
    for name, value in values.items():
        good = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < float("inf")
        if not good:
            raise ValueError(f"{name}={value!r} must be a number of at least 0.")


def check_output_type(output_type: Any) -> None:
    """Raise ValueError for an unknown output type."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r} must be one of {', '.join(OUTPUT_TYPES)}.")


def read_pair(name: str, value: Any) -> tuple[int, int]:
    """Two whole numbers of at least 0, such as (top, left)."""
    good = isinstance(value, (list, tuple)) and len(value) == 2
    if not good or any(not isinstance(v, numbers.Integral) or isinstance(v, bool) or v < 0 for v in value):
        raise ValueError(f"{name}={value!r} must be two whole numbers of at least 0.")
    return int(value[0]), int(value[1])


def read_generators(generator: Any, count: int) -> list[torch.Generator | None]:
    """One generator per image: those of a list, or one for all in turn."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != count or not all(isinstance(g, torch.Generator) for g in generator):
            raise ValueError(
                f"generator is a list of {len(generator)}; give one torch.Generator for each of {count} images."
            )
        return list(generator)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is a {type(generator).__name__}; give a torch.Generator, or one per image.")
    return [generator] * count


def read_noise(name: str, value: Any, shape: Sequence[int], counts: Sequence[int]) -> torch.Tensor | None:
    """Noise given as an argument: (B, *shape), where B is one of `counts`; None stays None."""
    if value is None:
        return None
    fits = isinstance(value, torch.Tensor) and value.ndim == 1 + len(shape) and tuple(value.shape[1:]) == tuple(shape)
    if not fits or len(value) not in counts:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        wanted = " or ".join(str((count, *shape)) for count in dict.fromkeys(counts))
        raise ValueError(f"{name} is {got} and must be a tensor of shape {wanted}.")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinity.")
    return value
