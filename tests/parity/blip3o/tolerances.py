"""How far BLIP3-o's results may be off: relative to max(1, |value|), as the golden README suggests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..report import Check

FORWARD = 5e-5  # one forward pass
TRAINING = 1e-4  # loss and gradients
TRAJECTORY = 2e-4  # several passes, each fed with the one before
MOST_PIXELS = 0.01  # share of the values that may be one level off


def close(check: Check, part: object, got: Any, want: Any, tolerance: float = FORWARD) -> None:
    """Compare relative to max(1, |want|); a shape that differs is a failure."""
    got, want = (torch.as_tensor(value).detach().double() for value in (got, want))
    if got.shape == want.shape:
        scale = want.abs().clamp_min(1)
        got, want = got / scale, want / scale
    check(part, got, want, tolerance)


def same_pixels(check: Check, part: str, got: Any, want: torch.Tensor) -> None:
    """Compare uint8 images: no value more than one level off, and at most 1% of them at all."""
    got = np.asarray(got)
    check(part, got, want, 1.0)
    if got.shape == tuple(want.shape):
        off = float((torch.as_tensor(np.array(got)) != want).double().mean())
        check(f"{part}: share of values that differ", off, 0.0, MOST_PIXELS)
