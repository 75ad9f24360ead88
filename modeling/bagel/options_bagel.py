"""Defaults and checks of the pipeline's options in model_index.json."""

import copy

from .guidance_bagel import Guidance
from .image_processor_bagel import ImageLimits

# Guidance by task, as in the original inferencer, and the system prompts of the release's training.
PRESETS = {
    "text_to_image": {
        "guidance_scale": 4.0,
        "image_guidance_scale": 1.0,
        "guidance_interval": [0.4, 1.0],
        "guidance_renorm": "global",
    },
    "with_references": {
        "guidance_scale": 4.0,
        "image_guidance_scale": 2.0,
        "guidance_interval": [0.0, 1.0],
        "guidance_renorm": "text_channel",
    },
}
THINK_PROMPTS = {
    "image": "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, "
    "i.e. <think> planning process here </think> image here",
    "text": "You should first think about the reasoning process in the mind and then provide the user with the "
    "answer. \nThe reasoning process is enclosed within <think> </think> tags, "
    "i.e. <think> reasoning process here </think> answer here",
}


def read_options(
    *,
    presets: dict | None,
    think_prompts: dict | None,
    vae_image_limits: dict | None,
    vision_image_limits: dict | None,
    max_references: int,
    vae_table: tuple[int, int],
    vision_table: tuple[int, int],
) -> dict:
    """The options to register: checked copies, completed by defaults.

    Args:
        vae_table, vision_table: (entries per side, pixels per entry) of the two position tables. By default the
            largest image fills the table, and the smallest has the share of the release (512 of 1024, 224 of 980).

    Raises:
        ValueError: names the option, its value and the allowed values.
    """
    latents, stride = vae_table
    patches, patch = vision_table
    limits = {
        "vae_image_limits": vae_image_limits
        or {"max_size": latents * stride, "min_size": max(1, latents // 2) * stride},
        "vision_image_limits": vision_image_limits
        or {"max_size": patches * patch, "min_size": max(1, round(patches * 16 / 70)) * patch},
    }
    for (name, value), table in zip(limits.items(), (vae_table, vision_table), strict=True):
        _check_limits(name, value, *table)
    presets = PRESETS if presets is None else presets
    _check_keys("presets", presets, PRESETS)
    for task, preset in presets.items():
        _check_keys(f"presets[{task!r}]", preset, PRESETS[task])
        Guidance.checked(*(preset[name] for name in PRESETS[task]))
    think_prompts = THINK_PROMPTS if think_prompts is None else think_prompts
    _check_keys("think_prompts", think_prompts, THINK_PROMPTS)
    for name, text in think_prompts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"think_prompts[{name!r}] is {text!r}; it must be a non-empty string.")
    if not isinstance(max_references, int) or isinstance(max_references, bool) or max_references < 0:
        raise ValueError(f"max_references={max_references!r} must be a whole number of at least 0.")
    options = {"presets": presets, "think_prompts": think_prompts, "max_references": max_references, **limits}
    return copy.deepcopy(options)


def _check_keys(name: str, value, wanted: dict) -> None:
    if not isinstance(value, dict) or set(value) != set(wanted):
        given = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{name} holds {given!r}; it must have exactly the keys {', '.join(wanted)}.")


def _check_limits(name: str, value: dict, entries: int, stride: int) -> None:
    _check_keys(name, value, dict.fromkeys(("max_size", "min_size")))
    sizes = [value["min_size"], value["max_size"]]
    if (
        any(not isinstance(s, int) or s % stride for s in sizes)
        or not stride <= sizes[0] <= sizes[1] <= entries * stride
    ):
        raise ValueError(
            f"{name}={value} is not possible: multiples of {stride} with {stride} <= min_size <= max_size <= "
            f"{entries * stride} (the end of the position table)."
        )


def image_limits(value: dict, stride: int) -> ImageLimits:
    """The limits of an option, for a position table with `stride` pixels per entry."""
    return ImageLimits(**value, stride=stride)
