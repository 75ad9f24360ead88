"""Classifier-free guidance over two branches, with renormalisation (golden/bagel/README.md, "CFG formula")."""

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
