"""Classifier-free guidance with two branches, and renormalization (tests/parity/golden/README.md, "CFG formula")."""

import math
import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

RENORMALISATIONS = ("global", "channel", "text_channel")


class ActiveBranches(NamedTuple):
    """The guidance branches that an update evaluates beside the conditional one."""

    text_free: bool
    image_free: bool


@dataclass(frozen=True)
class Guidance:
    """Guidance of one prompt's images.

    Args:
        scale: weight of the difference to the text-free branch; values up to 1 turn all guidance off.
        image_scale: weight of the difference to the image-free branch; values up to 1 turn that branch off.
        interval: (low, high): guidance is on while low < t <= high, where t is the shifted time.
        renorm: the norm that guidance may not increase: of the whole image ("global"), of each token ("channel"), or
            of each token before image guidance ("text_channel").
        renorm_min: smallest factor of the renormalization, in [0, 1].
    """

    scale: float
    image_scale: float
    interval: tuple[float, float]
    renorm: str
    renorm_min: float = 0.0

    @classmethod
    def checked(cls, scale: Any, image_scale: Any, interval: Any, renorm: Any, renorm_min: Any = 0.0) -> "Guidance":
        """Guidance from a caller's values. Raises ValueError naming the invalid one."""
        for name, value in (("guidance_scale", scale), ("image_guidance_scale", image_scale)):
            if not is_real(value) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0 (1 is off).")
        is_pair = isinstance(interval, (list, tuple)) and len(interval) == 2 and all(map(is_real, interval))
        if not is_pair or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(f"guidance_interval={interval!r} must be (low, high) with 0 <= low < high <= 1.")
        if renorm not in RENORMALISATIONS:
            raise ValueError(f"guidance_renorm={renorm!r} must be one of {', '.join(RENORMALISATIONS)}.")
        if not is_real(renorm_min) or not 0 <= renorm_min <= 1:
            raise ValueError(f"guidance_renorm_min={renorm_min!r} must lie in [0, 1].")
        return cls(float(scale), float(image_scale), (interval[0], interval[1]), renorm, float(renorm_min))

    @property
    def uses_images(self) -> bool:
        """Whether the image-free branch is ever evaluated."""
        return self.scale > 1 and self.image_scale > 1

    def active(self, t: float) -> ActiveBranches:
        """The branches that an update at time `t` evaluates."""
        text_free = self.scale > 1 and self.interval[0] < t <= self.interval[1]
        return ActiveBranches(text_free, text_free and self.image_scale > 1)


def is_real(value: Any) -> bool:
    """Whether a value is a real number, of Python or numpy."""
    return isinstance(value, numbers.Real)


def guide(
    v: torch.Tensor, v_text: torch.Tensor | None, v_image: torch.Tensor | None, guidance: Guidance
) -> torch.Tensor:
    """Combine the velocities of one image's branches.

    Args:
        v: (n, C) of the conditional branch.
        v_text: (n, C) of the text-free branch, or None if guidance is off: the result is `v`.
        v_image: (n, C) of the image-free branch, or None if image guidance is off.
    """
    if v_text is None:
        return v
    guided = v_text + guidance.scale * (v - v_text)
    if guidance.renorm == "text_channel":
        guided = guided * _renorm_factor(v, guided, -1, guidance.renorm_min)
    if v_image is not None:
        guided = v_image + guidance.image_scale * (guided - v_image)
    if guidance.renorm == "text_channel":
        return guided
    return guided * _renorm_factor(v, guided, -1 if guidance.renorm == "channel" else None, guidance.renorm_min)


def _renorm_factor(v: torch.Tensor, guided: torch.Tensor, dim: int | None, lowest: float) -> torch.Tensor:
    norm, guided_norm = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (v, guided))
    return (norm / (guided_norm + 1e-8)).clamp(lowest, 1.0)
