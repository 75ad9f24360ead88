"""Resizes the images of rows before a backbone prepares them (recipe section `resolution`).

Every backbone then applies its own limits: BAGEL, for example, resizes to the sizes of its position tables and rounds to
multiples of a latent token. Without this section, images are only resized by these limits, and never cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from echo4o.modeling.common.image_files import to_rgb
from echo4o.training.backbones.base import RowPreparation, WrappedPreparation
from echo4o.training.recipe import ResolutionSettings


class ResizedRows(WrappedPreparation):
    """Prepares rows with resized images."""

    def __init__(self, source: RowPreparation, settings: ResolutionSettings):
        super().__init__(source)
        self.settings = settings

    def prepare(self, rows: Sequence[dict]) -> Sequence[Any]:
        return self.source.prepare([self._resized(row) for row in rows])

    def _resized(self, row: dict) -> dict:
        image = row.get("image")
        references = [resize(to_rgb(reference), self.settings) for reference in row["reference_images"] or []]
        resized = None if image is None else resize(to_rgb(image, f"image of {row['id']}"), self.settings)
        return row | {"image": resized, "reference_images": references}


def resize(image: Image.Image, settings: ResolutionSettings) -> Image.Image:
    """The image at the size that the settings ask for."""
    if settings.bucket:
        return _fill(image, _nearest(image.size, settings.bucket))
    size = target_size(image.size, settings)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def target_size(size: tuple[int, int], settings: ResolutionSettings) -> tuple[int, int]:
    """Width and height within the limits. `max_side` wins over `min_side` where an image is too long for both."""
    scale, (short, long) = 1.0, sorted(size)
    if settings.min_side and short < settings.min_side:
        scale = settings.min_side / short
    if settings.max_side and long * scale > settings.max_side:
        scale = settings.max_side / long
    step = settings.multiple_of or 1
    width, height = (max(step, round(side * scale / step) * step) for side in size)
    return width, height


def _nearest(size: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio differs least by factor; of equal ones, the one of the nearest area."""
    width, height = size

    def distance(bucket: tuple[int, int]) -> tuple[float, float]:
        ratio = (width / height) / (bucket[0] / bucket[1])
        return max(ratio, 1 / ratio), abs(bucket[0] * bucket[1] - width * height)

    return min(buckets, key=distance)


def _fill(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale the image to cover `size` and crop it at its centre."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = (max(side, round(own * scale)) for side, own in zip(size, image.size))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size[0], top + size[1]))
