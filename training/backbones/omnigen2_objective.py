"""OmniGen2's objective: conditions that are dropped, times, flow matching.

Random numbers are arguments; this file draws none. The conventions are those of the original's training script
(tests/parity/golden_omnigen2/README.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# The first of these that occurs in an instruction of a text-to-image row can be deleted from it.
PREFIXES = (
    "The image portrays ",
    "The image depicts ",
    "The image captures ",
    "The image highlights ",
    "The image shows ",
    "这张图片展示了",
)


def without_prefix(instruction: str) -> str:
    """The instruction without the first of [`PREFIXES`] found in it, which is deleted at all its places."""
    found = next((prefix for prefix in PREFIXES if prefix in instruction), None)
    return instruction if found is None else instruction.replace(found, "")


@dataclass(frozen=True)
class DroppedConditions:
    """What is left out of a row in one epoch."""

    prefix: bool = False
    prompt: bool = False
    references: bool = False


def choose_dropped(
    draw: Callable[[], float], is_text_to_image: bool, prefix: float, prompt: float, references: float
) -> DroppedConditions:
    """Choose by the probabilities; `draw` gives numbers in [0, 1), in the original's order.

    References are only dropped together with the prompt, with the probability `references` if it is dropped.
    """
    drops_prefix = is_text_to_image and draw() < prefix
    drops_prompt = draw() < prompt
    return DroppedConditions(drops_prefix, drops_prompt, drops_prompt and draw() < references)


def shift_time(t: torch.Tensor, tokens: int, version: str) -> torch.Tensor:
    """Move times (0 is noise, 1 is data) towards noise, the more the larger the target is.

    Args:
        tokens: latent patches of the target.
        version: "v1" (the release's), "v2", or "none".
    """
    if version == "v1":
        factor = math.exp(0.5 + 0.65 * (tokens - 256) / 3840)
        return 1 - factor / (factor + 1 / (1 - t) - 1)
    if version == "v2":
        factor = math.sqrt(tokens) / 20
        return t / (factor - factor * t + t)
    return t


def raw_time_of(time: float, tokens: int, version: str) -> float:
    """The raw time whose sigmoid [`shift_time`] turns into `time`, in [0, 1); minus infinity for 0."""
    if time <= 0:
        return -math.inf
    factors = {"v1": math.exp(0.5 + 0.65 * (tokens - 256) / 3840), "v2": math.sqrt(tokens) / 20, "none": 1.0}
    return math.log(factors[version] * time / (1 - time))


def flow_matching(
    targets: Sequence[torch.Tensor], noises: Sequence[torch.Tensor], times: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Noisy latents t*x1 + (1-t)*x0 and velocities x1 - x0, for latents (C, h, w) and times (N,)."""
    pairs = list(zip(targets, noises, times, strict=True))
    return [t * x1 + (1 - t) * x0 for x1, x0, t in pairs], [x1 - x0 for x1, x0, _ in pairs]
