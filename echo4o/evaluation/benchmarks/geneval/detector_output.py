"""Input and output of GenEval's detector, as mmdet 2 computes them around Mask2Former.

transformers' `Mask2FormerImageProcessor` gives other numbers: it stretches images instead of padding them, and computes
scores and masks at a fixed 384 x 384.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

LONG_SIDE, SHORT_SIDE = 1333, 800  # pixels; the image is resized to fit both
PAD_MULTIPLE, PAD_VALUE = 32, 128
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of 8-bit RGB
MAX_DETECTIONS = 100
BACKGROUND = (153, 153, 153)  # what surrounds an object in the crop that the colour classifier sees


@dataclass(frozen=True)
class RawDetection:
    """A detection with its mask.

    Attributes:
        label: the class by index.
        score: class probability times mean mask confidence.
        box: x0, y0, x1, y1 in pixels of the original image; zeros for an empty mask.
        mask: (height, width) of the original image.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    mask: "np.ndarray[Any, Any]"


def resized_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the detector's input before padding."""
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the detector's input after padding."""
    return tuple(-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in (height, width))  # type: ignore[return-value]


def prepare_image(image: "Image.Image") -> "torch.Tensor":
    """The detector's input of an RGB image: (3, height, width), resized without antialiasing, padded, normalized."""
    import torch

    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()
    height, width = resized_size(*pixels.shape[-2:])
    resized = _resize(pixels, (height, width))[0].round().clamp(0, 255)
    full_height, full_width = padded_size(height, width)
    padded = torch.full((3, full_height, full_width), float(PAD_VALUE))
    padded[:, :height, :width] = resized
    return (padded - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _resize(values: "torch.Tensor", size: Sequence[int]) -> "torch.Tensor":
    from torch.nn.functional import interpolate

    return interpolate(values, size=tuple(size), mode="bilinear", align_corners=False, antialias=False)


def read_output(
    class_logits: "torch.Tensor",
    mask_logits: "torch.Tensor",
    padded: Sequence[int],
    resized: Sequence[int],
    original: Sequence[int],
    min_score: float = 0.0,
) -> list[RawDetection]:
    """The detections of one image, in the order of their class probabilities' ranking.

    Args:
        class_logits: (queries, classes + 1); the last class is "no object".
        mask_logits: (queries, height, width) at the decoder's resolution.
        padded, resized, original: (height, width) of the input with and without padding, and of the image.
        min_score: detections must have a higher score.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1]
    classes = probabilities.shape[1]
    best, places = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()), sorted=False)
    # Masks are enlarged once per query: one query can appear under several classes.
    queries = (places // classes).unique().tolist()
    masks = {query: _full_mask(mask_logits[query], padded, resized, original) for query in queries}
    detections = []
    for probability, place in zip(best, places.tolist()):
        mask, confidence, box = masks[place // classes]
        score = float(probability * confidence)
        if score > min_score:
            detections.append(RawDetection(place % classes, score, box, mask))
    return detections


def _full_mask(logits: "torch.Tensor", padded: Sequence[int], resized: Sequence[int], original: Sequence[int]):
    """The mask of a query at the original size, the mean confidence inside, and its box."""
    enlarged = _resize(logits[None, None], padded)[..., : resized[0], : resized[1]]
    full = _resize(enlarged, original)[0, 0]
    inside = (full > 0).float()
    # Summed along one flat axis of a batch, as the original does; another order changes the last bits.
    confidence = ((full.sigmoid() * inside)[None].flatten(1).sum(1) / (inside[None].flatten(1).sum(1) + 1e-6))[0]
    mask = (full > 0).cpu().numpy()
    return mask, confidence, _box(mask)


def _box(mask: "np.ndarray[Any, Any]") -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def crop_object(
    image: "Image.Image",
    box: Sequence[float],
    mask: "np.ndarray[Any, Any] | None",
    background: tuple[int, int, int] | None = BACKGROUND,
    crop: bool = True,
) -> "Image.Image":
    """What the colour classifier sees of an object: its box, with one colour outside of its mask.

    Args:
        box: rounded half to even; beyond the image is black.
        mask: (height, width) of the image; None: nothing is filled.
        background: None leaves the surroundings as they are.
        crop: False returns the whole image.
    """
    from PIL import Image

    image = image.convert("RGB")
    if mask is not None and background is not None:
        pixels = np.where(mask[..., None].astype(bool), np.asarray(image), np.array(background, np.uint8))
        image = Image.fromarray(pixels)
    if not crop:
        return image
    x0, y0, x1, y1 = (round(float(side)) for side in box)
    return image.crop((x0, y0, x1, y1))


def color_texts(class_name: str, color: str) -> tuple[str, str, str]:
    """The three texts whose mean embedding stands for a colour of a class."""
    return (
        f"a photo of a {color} {class_name}",
        f"a photo of a {color}-colored {class_name}",
        f"a photo of a {color} object",
    )
