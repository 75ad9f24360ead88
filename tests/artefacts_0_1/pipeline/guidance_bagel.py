"""Classifier-free guidance over two branches, with renormalisation (tests/parity/golden/README.md, "CFG formula")."""

import math
import numbers
from dataclasses import dataclass

import torch

RENORMALISATIONS = ("global", "channel", "text_channel")


@dataclass(frozen=True)
class Guidance:
    """How one prompt's pictures are guided.

    Args:
        scale: pull away from the text-free branch; at most 1 turns all guidance off.
        image_scale: pull away from the image-free branch; at most 1 turns that branch off.
        interval: (low, high): guidance acts while low < t <= high, t being the shifted time.
        renorm: what the guided velocity's norm may not exceed: the whole picture's ("global"), each token's
            ("channel"), or each token's before the image step ("text_channel").
        renorm_min: lowest factor that renormalisation may apply, in [0, 1].
    """

    scale: float
    image_scale: float
    interval: tuple[float, float]
    renorm: str
    renorm_min: float = 0.0

    @classmethod
    def checked(cls, scale, image_scale, interval, renorm, renorm_min=0.0) -> "Guidance":
        """From a caller's values; ValueError names the one that is not possible."""
        for name, value in (("guidance_scale", scale), ("image_guidance_scale", image_scale)):
            if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0 (1 is off).")
        pair = isinstance(interval, (list, tuple)) and len(interval) == 2
        if (
            not pair
            or not all(isinstance(x, numbers.Real) for x in interval)
            or not 0 <= interval[0] < interval[1] <= 1
        ):
            raise ValueError(f"guidance_interval={interval!r} must be (low, high) with 0 <= low < high <= 1.")
        if renorm not in RENORMALISATIONS:
            raise ValueError(f"guidance_renorm={renorm!r} must be one of {', '.join(RENORMALISATIONS)}.")
        if not isinstance(renorm_min, numbers.Real) or not 0 <= renorm_min <= 1:
            raise ValueError(f"guidance_renorm_min={renorm_min!r} must lie in [0, 1].")
        return cls(float(scale), float(image_scale), tuple(interval), renorm, float(renorm_min))

    def branches(self, t: float) -> tuple[bool, bool]:
        """(text-free, image-free) branches that a step at time `t` needs."""
        text = self.scale > 1 and self.interval[0] < t <= self.interval[1]
        return text, text and self.image_scale > 1


def guide(
    v: torch.Tensor, v_text: torch.Tensor | None, v_image: torch.Tensor | None, guidance: Guidance
) -> torch.Tensor:
    """Combine the branches of one picture.

    Args:
        v: (n, C) velocity under the full condition.
        v_text: (n, C) without the last text, or None when guidance is off at this step: the result is `v`.
        v_image: (n, C) without pictures, or None when image guidance is off.
    """
    if v_text is None:
        return v
    guided = v_text + guidance.scale * (v - v_text)
    if guidance.renorm == "text_channel":
        guided = guided * _factor(v, guided, -1, guidance.renorm_min)
    if v_image is not None:
        guided = v_image + guidance.image_scale * (guided - v_image)
    if guidance.renorm == "text_channel":
        return guided
    return guided * _factor(v, guided, -1 if guidance.renorm == "channel" else None, guidance.renorm_min)


def _factor(v: torch.Tensor, guided: torch.Tensor, dim: int | None, lowest: float) -> torch.Tensor:
    norms = (torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in (v, guided))
    return (next(norms) / (next(norms) + 1e-8)).clamp(lowest, 1.0)
