"""Renders scenes of Shapes-4o to images."""

import io
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from PIL import Image

from echo4o.evaluation.benchmarks.shapes4o.scene import (
    BACKGROUND,
    CELL,
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    SceneObject,
)

_SUPERSAMPLE = 8
_TINTS = 13  # per colour channel


def render(objects: Iterable[SceneObject], background: tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """Renders the objects, anti-aliased, on a plain background: an RGB image of 64 x 64 pixels."""
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = background
    for thing in objects:
        alpha = coverage(thing.shape, thing.size)[..., None]
        cell = canvas[thing.row * CELL : (thing.row + 1) * CELL, thing.column * CELL : (thing.column + 1) * CELL]
        cell += alpha * (np.asarray(COLOURS[thing.colour], np.float32) - cell)
    return Image.fromarray((canvas + 0.5).astype(np.uint8))


def tint(index: int) -> tuple[int, int, int]:
    """A light background near BACKGROUND: 2197 different ones, then again from the first."""
    steps = index * 1000 % _TINTS**3  # 1000 and 13 are coprime, so all tints occur before one repeats
    red, green, blue = (base - _TINTS // 2 + steps // _TINTS**axis % _TINTS for axis, base in enumerate(BACKGROUND))
    return red, green, blue


@lru_cache(maxsize=len(SHAPES) * len(SIZES))
def coverage(shape: str, size: str) -> np.ndarray:
    """How much of each pixel of a cell the shape covers: float32 (16, 16) in [0, 1], read-only."""
    steps = CELL * _SUPERSAMPLE
    axis = ((np.arange(steps) + 0.5) / _SUPERSAMPLE - CELL / 2) / (SIZES[size] / 2)
    inside = _INSIDE[shape](axis[None, :], -axis[:, None])
    inside = np.broadcast_to(inside, (steps, steps)).astype(np.float32)
    alpha = inside.reshape(CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE).mean((1, 3))
    alpha.flags.writeable = False
    return alpha


def _circle(x, y):
    return x**2 + y**2 <= 1


def _square(x, y):
    return np.maximum(abs(x), abs(y)) <= 0.9


def _triangle(x, y):
    return (y >= -0.9) & (abs(x) <= (0.95 - y) / 1.85)


def _cross(x, y):
    return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)


def _heart(x, y):
    y = 1.12 * y + 0.2
    return x**2 + (y - 0.7 * np.sqrt(abs(x))) ** 2 <= 1


def _star(x, y):
    # Folded into the wedge between a tip (angle 0, radius 1) and its notch (angle pi / 5, radius 0.45): one edge.
    radius = np.hypot(x, y + 0.05)
    angle = np.arctan2(x, y + 0.05) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    edge = 0.45 * np.exp(1j * np.pi / 5) - 1
    tip_to_point = radius * np.exp(1j * angle) - 1
    return edge.real * tip_to_point.imag - edge.imag * tip_to_point.real >= 0


_INSIDE = {
    "heart": _heart,
    "star": _star,
    "triangle": _triangle,
    "cross": _cross,
    "circle": _circle,
    "square": _square,
}


def png(image: Image.Image) -> bytes:
    """Returns the image as a PNG file; the same image gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()
