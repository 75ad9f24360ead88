"""GenEval's decisions as pure functions of stored detections (arXiv 2310.11513; github.com/djghosh13/geneval @ af4902f).

Scores and boxes are compared in float32, as the original does: float32(0.3) is not above a threshold of 0.3.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

# The classes by index of the detector: COCO's order, with GenEval's own names for 64, 65 and 66.
CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
_SMALLEST_OFFSET = 1e-3  # pixels; boxes closer than this have no relation
_DOMINANT = 0.5  # share of the offset that a direction needs


@dataclass(frozen=True)
class Detection:
    """An object that the detector found.

    Attributes:
        class_name: one of CLASSES.
        box: x0, y0, x1, y1 in pixels, y downwards.
        score: confidence, 0 to 1.
        color_logits: the classifier's logits in the order of COLORS; None where it was not asked.
    """

    class_name: str
    box: tuple[float, float, float, float]
    score: float
    color_logits: tuple[float, ...] | None = None

    @property
    def color(self) -> str:
        """The colour with the highest logit, the first of equals. Raises ValueError if it was not classified."""
        if self.color_logits is None:
            raise ValueError(
                f"the colour of a {self.class_name} with score {self.score:.3f} is not stored: the thresholds admit "
                "objects that the run with the detector did not classify; delete detections.jsonl to run it again"
            )
        return COLORS[int(np.argmax(self.color_logits))]


@dataclass(frozen=True)
class Thresholds:
    """The constants of the decision; the defaults are the original's.

    Args:
        score: an object counts if its score is above this (compared in float32).
        counting_score: the same for prompts with the tag `counting`.
        max_objects: the most objects of a class.
        max_overlap: an object is dropped if its IoU with a better one is this or more; 1: none is.
        position: share of the sizes by which two objects have to be apart.
    """

    score: float = 0.3
    counting_score: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position: float = 0.1

    def of_tag(self, tag: str) -> float:
        return self.counting_score if tag == "counting" else self.score


@dataclass
class ImageDecision:
    """Whether an image shows what its prompt asks for.

    Attributes:
        reasons: why not, one text per violated clause.
        kept: by class, the numbers of the detections that count, best first.
        classified: how many objects were asked for their colour.
    """

    kept: dict[str, list[int]]
    reasons: list[str] = field(default_factory=list)
    classified: int = 0

    @property
    def correct(self) -> bool:
        return not self.reasons


def decide(
    metadata: Mapping[str, Any], detections: Sequence[Detection], thresholds: Thresholds | None = None
) -> ImageDecision:
    """The decision about one image.

    Args:
        metadata: a line of the prompt file: `tag`, `include`, `exclude`.
        detections: of the image, in the detector's order.
    """
    thresholds = thresholds or Thresholds()
    decision = ImageDecision(keep(detections, thresholds, thresholds.of_tag(metadata["tag"])))
    found = {name: [detections[n] for n in numbers] for name, numbers in decision.kept.items()}
    matched: list[list[Detection] | None] = []
    for clause in metadata.get("include", []):
        # Only the best-scored objects are looked at: a second, fitting object does not help.
        objects = found.get(clause["class"], [])[: clause["count"]]
        reason = _violation(clause, objects, matched, thresholds, decision)
        matched.append(None if reason else objects)
        decision.reasons += [reason] if reason else []
    for clause in metadata.get("exclude", []):
        count = len(found.get(clause["class"], []))
        if count >= clause["count"]:
            decision.reasons.append(f"expected {clause['class']}<{clause['count']}, found {count}")
    return decision


def keep(detections: Sequence[Detection], thresholds: Thresholds, above: float) -> dict[str, list[int]]:
    """The detections that count, by class, as numbers, best first. Of equal scores, the later detection comes first."""
    by_class = defaultdict(list)
    for number, detection in enumerate(detections):
        if np.float32(detection.score) > np.float32(above):
            by_class[detection.class_name].append(number)
    kept = {}
    for name, numbers in by_class.items():
        ordered = sorted(numbers, key=lambda n: (np.float32(detections[n].score), n), reverse=True)
        kept[name] = _without_overlaps(detections, ordered[: thresholds.max_objects], thresholds.max_overlap)
    return kept


def _without_overlaps(detections: Sequence[Detection], ordered: list[int], max_overlap: float) -> list[int]:
    if max_overlap == 1:
        return ordered
    kept: list[int] = []
    for number in ordered:
        if all(iou(detections[better].box, detections[number].box) < max_overlap for better in kept):
            kept.append(number)
    return kept


def _violation(
    clause: Mapping[str, Any],
    objects: list[Detection],
    matched: list[list[Detection] | None],
    thresholds: Thresholds,
    decision: ImageDecision,
) -> str | None:
    """Why a clause does not hold; None if it does."""
    name, count = clause["class"], clause["count"]
    if len(objects) < count:
        return f"expected {name}>={count}, found {len(objects)}"
    if "color" in clause:
        decision.classified += len(objects)
        colors, color = [found.color for found in objects], clause["color"]
        if colors.count(color) < count:
            listed = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
            return f"expected {color} {name}>={count}, found {colors.count(color)} {color}; and {listed}"
    if "position" not in clause:
        return None
    relation, target = clause["position"]
    targets = matched[target]
    if targets is None:
        return f"no target for {name} to be {relation}"
    for one, other in product(objects, targets):
        relations = relative_position(one.box, other.box, thresholds.position)
        if relation not in relations:
            return f"expected {name} {relation} target, found {' and '.join(relations)} target"
    return None


def relative_position(a: Sequence[float], b: Sequence[float], threshold: float = 0.1) -> tuple[str, ...]:
    """The relations of box A to box B, in the order of RELATIONS; two can hold at once."""
    corners = np.array([a, b], np.float32).reshape(2, 2, 2)  # box, corner, axis
    centers = corners.mean(axis=1)
    sizes = np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    apart = np.maximum(np.abs(offset) - np.float32(threshold) * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if (np.abs(apart) < _SMALLEST_OFFSET).all():
        return ()
    dx, dy = apart / np.linalg.norm(offset)
    holds = (dx < -_DOMINANT, dx > _DOMINANT, dy < -_DOMINANT, dy > _DOMINANT)
    return tuple(relation for relation, does in zip(RELATIONS, holds) if does)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes whose last pixels belong to them (width + 1)."""

    def area(x0: float, y0: float, x1: float, y1: float) -> float:
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - common
    return common / union if union else 0.0


@dataclass(frozen=True)
class Summary:
    """The original's summary of a set of judged images.

    Attributes:
        tags: by tag, in order of appearance: right images and images.
        prompts: right prompts (with at least one right image) and prompts.
    """

    tags: dict[str, tuple[int, int]]
    prompts: tuple[int, int]

    @property
    def overall(self) -> float:
        """The mean of the tags' shares of right images."""
        return fmean(right / total for right, total in self.tags.values())

    @property
    def images(self) -> tuple[int, int]:
        rights, totals = zip(*self.tags.values())
        return sum(rights), sum(totals)


def summarize(images: Sequence[tuple[str, Any, bool]]) -> Summary:
    """Summarize images, each as (tag, key of its prompt, whether it is right)."""
    tags: dict[str, tuple[int, int]] = {}
    prompts: dict[Any, bool] = {}
    for tag, prompt, correct in images:
        right, total = tags.get(tag, (0, 0))
        tags[tag] = (right + correct, total + 1)
        prompts[prompt] = prompts.get(prompt, False) or correct
    return Summary(tags, (sum(prompts.values()), len(prompts)))
