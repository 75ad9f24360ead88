"""Detects the objects in a Shapes-4o image and compares them with a prompt.

Only pixels are used: the image is enlarged, pixels that differ from the background are assigned to the nearest colour,
and each connected component is compared with the outlines of all shapes. When results of this file change, change
`DETECTOR_FINGERPRINT` in judges/pixels.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from echo4o.evaluation.benchmarks.shapes4o.rendering import coverage
from echo4o.evaluation.benchmarks.shapes4o.scene import (
    BACKGROUND,
    CELL,
    COLOURS,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    ShapeGroup,
)

SCALE = 2  # the working size is 128 pixels: outlines of 8-pixel objects are too coarse to compare at 64
TEMPLATE = 32
MIN_AREA = 8.0  # square pixels; the smallest object, a small star, has 21
MIN_DICE = 0.8
MIN_COVER = 0.5
LARGER = 1.2  # "larger" is at least this many times the other's extent; drawn sizes differ by 1.25 and more


@dataclass(frozen=True)
class FoundObject:
    """An object found in an image.

    Attributes:
        shape: One of SHAPES, or None if no outline fits well enough.
        colour: One of COLOURS.
        x, y: The centre in pixels, from the left and from the top.
        extent: Its width in pixels, derived from its area and the shape that fits best.
        size: The name in SIZES nearest to the extent.
        dice: How well the best outline fits, in [0, 1].
    """

    shape: str | None
    colour: str
    x: float
    y: float
    extent: float
    size: str
    dice: float

    @property
    def row(self) -> int:
        return min(GRID - 1, max(0, int(self.y // CELL)))

    @property
    def column(self) -> int:
        return min(GRID - 1, max(0, int(self.x // CELL)))


def detect(image: Image.Image | np.ndarray) -> list[FoundObject]:
    """Finds the objects of an image, in reading order (by row, then column).

    Args:
        image: An RGB image of 64 x 64 pixels, or an array (64, 64, 3) of uint8.

    Raises:
        ValueError: another size.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"the image is {image.size[0]} x {image.size[1]}; it must be {IMAGE_SIZE} x {IMAGE_SIZE}")
    large = image.convert("RGB").resize((IMAGE_SIZE * SCALE, IMAGE_SIZE * SCALE), Image.Resampling.BICUBIC)
    pixels = np.asarray(large, np.float32)
    cover, nearest = _colours(pixels - _background(pixels))
    found = [
        thing
        for index, colour in enumerate(COLOURS)
        for thing in _pieces((cover > MIN_COVER) & (nearest == index), colour)
    ]
    return sorted(found, key=lambda thing: (thing.row, thing.column, thing.x))


def _background(pixels: np.ndarray) -> np.ndarray:
    """The plain colour behind the objects: the median of the pixels without chroma."""
    plain = pixels[np.ptp(pixels, axis=-1) < 24]
    return np.median(plain, axis=0) if len(plain) > pixels.size // 3 // 8 else np.asarray(BACKGROUND, np.float32)


def _colours(difference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel is covered, and by which colour.

    A half-covered pixel lies between the background and the colour, so directions from the background are compared,
    not distances: an anti-aliased edge keeps its colour.
    """
    palette = np.asarray(list(COLOURS.values()), np.float32) - np.asarray(BACKGROUND, np.float32)
    lengths = np.linalg.norm(palette, axis=1)
    along = difference @ (palette / lengths[:, None]).T
    nearest = along.argmax(-1)
    return np.take_along_axis(along / lengths, nearest[..., None], -1)[..., 0], nearest


def _pieces(mask: np.ndarray, colour: str) -> Iterable[FoundObject]:
    labelled: Any = ndimage.label(mask)  # (labels, number of labels)
    labels = labelled[0]
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        piece = labels[box] == index
        area = piece.sum() / SCALE**2
        if area < MIN_AREA:
            continue
        shape, dice = _nearest_shape(piece)
        centre: Any = ndimage.center_of_mass(piece)  # (row, column) of a single object
        y, x = centre
        extent = float(np.sqrt(area / _unit_area(shape)))
        size = min(SIZES, key=lambda name: abs(SIZES[name] - extent))
        y, x = (box[0].start + y + 0.5) / SCALE, (box[1].start + x + 0.5) / SCALE
        yield FoundObject(shape if dice >= MIN_DICE else None, colour, x, y, extent, size, dice)


def _nearest_shape(piece: np.ndarray) -> tuple[str, float]:
    outline = _normalised(piece.astype(np.float32))
    overlap = 2 * (_templates() * outline).sum((1, 2)) / (_templates().sum((1, 2)) + outline.sum())
    best = int(overlap.argmax())
    return SHAPES[best // len(SIZES)], float(overlap[best])


def _normalised(piece: np.ndarray) -> np.ndarray:
    """A mask cropped to the square around its box, in a fixed size: bool (32, 32). A half square stays a half."""
    rows, columns = np.nonzero(piece > 0.5)
    piece = piece[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    missing = [max(piece.shape) - length for length in piece.shape]
    piece = np.pad(piece, [(lack // 2, lack - lack // 2) for lack in missing])
    return np.asarray(Image.fromarray(piece).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)) > 0.5


@lru_cache
def _templates() -> np.ndarray:
    """The outlines of all shapes in all sizes, as the enlarged image shows them: bool (shapes * sizes, 32, 32)."""
    side = CELL * SCALE
    outlines = []
    for shape in SHAPES:
        for size in SIZES:
            large = Image.fromarray(coverage(shape, size)).resize((side, side), Image.Resampling.BICUBIC)
            outlines.append(_normalised(np.asarray(large)))
    return np.stack(outlines)


def _unit_area(shape: str) -> float:
    """The area of a shape whose extent is 1."""
    return float(coverage(shape, "medium").sum()) / SIZES["medium"] ** 2


# --- comparison with the prompt -----------------------------------------------------------------------------------


def check(groups: Sequence[ShapeGroup], found: Sequence[FoundObject]) -> tuple[bool, list[str]]:
    """Whether exactly the objects of the prompt were found, and all reasons why not.

    Only stated properties count: a group without a colour may have any, a group without a region may be anywhere.
    "left", "right", "above" and "below" are halves of the image; "beside" is side by side at the same height;
    "large" and "small" are relative to the other groups.
    """
    reasons = [
        f"{'a' if thing.shape is None else 'an unasked'} {thing.colour} {thing.shape or 'thing of no clear shape'}"
        f" at ({thing.x:.0f}, {thing.y:.0f})"
        for thing in found
        if not any(_is_of(group, thing) for group in groups)
    ]
    members = [[thing for thing in found if _is_of(group, thing)] for group in groups]
    for group, of_group in zip(groups, members):
        name = " ".join(filter(None, (group.colour, group.shape)))
        if len(of_group) != group.count:
            reasons.append(f"{len(of_group)} x {name}, asked for {group.count}")
        reasons += [
            f"{name} at ({thing.x:.0f}, {thing.y:.0f}) is not {group.region}"
            for thing in of_group
            if not _in_region(group.region, thing)
        ]
    if not reasons:
        reasons += _relations(groups, members)
    return not reasons, reasons


def _is_of(group: ShapeGroup, thing: FoundObject) -> bool:
    return thing.shape == group.shape and group.colour in (None, thing.colour)


def _in_region(region: str | None, thing: FoundObject) -> bool:
    middle = IMAGE_SIZE / 2
    inside = {
        "left": thing.x < middle,
        "right": thing.x > middle,
        "above": thing.y < middle,
        "below": thing.y > middle,
    }
    return inside.get(region or "", True)


def _relations(groups: Sequence[ShapeGroup], members: Sequence[Sequence[FoundObject]]) -> list[str]:
    """Returns the wrong sizes and positions between groups whose objects were all found."""
    reasons = []
    large = [thing for group, of in zip(groups, members) if group.size == "large" for thing in of]
    small = [thing for group, of in zip(groups, members) if group.size == "small" for thing in of]
    if large and small:
        ratio = min(thing.extent for thing in large) / max(thing.extent for thing in small)
        if ratio < LARGER:
            reasons.append(f"the larger is {ratio:.2f} times the smaller, at least {LARGER} is asked")
    beside = [thing for group, of in zip(groups, members) if group.region == "beside" for thing in of]
    for one, other in zip(beside, beside[1:]):
        across, down = abs(one.x - other.x), abs(one.y - other.y)
        if down > CELL / 2 or not CELL / 2 < across < 2 * CELL:
            reasons.append(f"{one.shape} and {other.shape} are {across:.0f} across and {down:.0f} down: not beside")
    return reasons
