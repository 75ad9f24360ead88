"""Comparisons that go beyond one largest difference."""

from __future__ import annotations

import numpy as np
import torch

from ..report import EXACT, PICTURE, Check

DIFFERING = 0.005  # share of uint8 values that may differ by one
LOSS = 1e-5  # relative, of a loss
NORM = 1e-3  # relative, of the norm of a gradient
DELTA = 0.02  # relative, of the norm of a weight's change after Adam


def compare_images(check: Check, part: object, got, want) -> None:
    """uint8 images: at most one apart, and few of them. Rounding down would pass the first comparison alone."""
    got, want = np.asarray(got).astype(int), np.asarray(want).astype(int)
    check(part, got, want, PICTURE)
    if got.shape == want.shape:
        check(f"{part}: share of differing values", (got != want).mean(), 0.0, DIFFERING)


def compare_relative(check: Check, part: object, got, want, tolerance: float) -> None:
    """Numbers, relative to the golden one (absolutely below 1e-6)."""
    got, want = float(got), float(want)
    check(part, (got - want) / max(abs(want), 1e-6), 0.0, tolerance)


def compare_gradient(check: Check, part: object, got: torch.Tensor, want: torch.Tensor) -> None:
    """Gradients, as a share of the largest difference that may be: 1e-4 and 5e-4 of the largest value."""
    allowed = 1e-4 + 5e-4 * float(want.abs().max())
    check(part, got / allowed, want / allowed, 1.0)


def compare_masks(check: Check, part: object, lengths: list[int], mask: torch.Tensor, rows=None) -> None:
    """Our unpadded texts have the lengths of a right-padded mask."""
    rows = range(len(lengths)) if rows is None else rows
    check(f"{part}: rows", len(lengths), mask.shape[0], EXACT)
    for row in rows:
        want = torch.arange(mask.shape[1]) < lengths[row]
        check(f"{part}.{row}", want.long(), mask[row].long())
