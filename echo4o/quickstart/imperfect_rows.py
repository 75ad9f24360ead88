"""Renders the training rows of the base model: scenes of several objects with imperfect captions, and single objects.

The base model has the role that BAGEL has for Echo-4o: a capable model that was trained on imperfectly captioned images.
No caption and no image has held-out content.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from echo4o.evaluation.benchmarks.shapes4o.grammar import (
    PARTS,
    ShapesPrompt,
    is_held_out,
    listed,
    part_of,
    placed,
    tags_of,
    training_prompt,
)
from echo4o.evaluation.benchmarks.shapes4o.rendering import render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import (
    COLOURS,
    GRID,
    SHAPES,
    SceneObject,
    ShapeGroup,
    lay_out,
    lay_out_reference,
)
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import ROWS

MISALIGNED = 0.65  # share of scenes whose caption (and references) belong to another scene of the same tag
LOOSE = 0.1  # share of captions that leave an object out, of those with several objects and no references
CLUTTERED = 0.1  # share of images with one object that no caption mentions
TINTS = 2197
# Kinds of every 20 rows.
_KINDS = ("scene",) * 16 + ("single object",) * 3 + ("question",)


def single_objects() -> list[ShapeGroup]:
    """Returns every single object that is not held out, with its colour, and without it if it is the typical colour."""
    stated = [ShapeGroup(shape, colour) for shape in SHAPES for colour in COLOURS]
    return [group for group in [*stated, *(ShapeGroup(shape) for shape in SHAPES)] if not is_held_out([group])]


def single_object_prompts(number: int) -> list[ShapesPrompt]:
    """Returns prompts for single objects, whose captions in the base model's training rows are exact."""
    groups = [group for group in single_objects() if group.colour]
    chosen = [groups[i] for i in np.random.default_rng(5).permutation(len(groups))[:number]]
    return [ShapesPrompt("single object", f"a photo of {_name(group)}", (group,)) for group in chosen]


def imperfect_rows(number: int, seed: int) -> list[dict]:
    """Returns rows for training: of every 20, 16 scenes, 3 single objects and one question about a single object."""
    rng = np.random.default_rng([seed, 77])
    return [{"id": f"imperfect-{seed}-{i}"} | _row(_KINDS[i % len(_KINDS)], rng) for i in range(number)]


def training_dataset(rows: list[dict]) -> Dataset:
    """The rows as the trainer reads them."""
    from echo4o.training.columns import FEATURES

    return Dataset.from_list(rows, features=FEATURES)


def _row(kind: str, rng: np.random.Generator) -> dict:
    background = tint(int(rng.integers(TINTS)))
    if kind == "scene":
        return _scene_row(rng, background)
    group = single_objects()[int(rng.integers(len(single_objects())))]
    image = render(lay_out([group]), background)
    if kind == "question":
        named = ShapeGroup(group.shape, group.drawn_colour)
        return {
            "instruction": "what is this?",
            "reference_images": [image],
            "image": None,
            "answer": _name(named),
        }
    return {"instruction": f"a photo of {_name(group)}", "reference_images": [], "image": image, "answer": None}


@dataclass(frozen=True)
class ImperfectScene:
    """A scene and its caption.

    Attributes:
        shown: the prompt that the image was laid out for.
        captioned: the prompt that the caption and the references belong to.
        mentioned: the groups of `captioned` that the caption mentions.
        clutter: an object of the image that no prompt mentions.
    """

    shown: ShapesPrompt
    captioned: ShapesPrompt
    mentioned: tuple[ShapeGroup, ...]
    clutter: SceneObject | None = None

    @property
    def caption(self) -> str:
        if self.mentioned == self.captioned.groups:
            return self.captioned.text
        return "a photo of " + listed([placed(group) for group in self.mentioned])

    @property
    def objects(self) -> tuple[SceneObject, ...]:
        """The objects of the image."""
        return (*lay_out(self.shown.groups), *([self.clutter] if self.clutter else []))


def imperfect_scene(rng: np.random.Generator) -> ImperfectScene:
    """Draws a scene: the parts have the shares of the dataset Shapes-4o, the tags of a part have equal shares."""
    shares = np.array([ROWS[part] for part in PARTS]) / sum(ROWS.values())
    tags = tags_of(PARTS[int(rng.choice(len(PARTS), p=shares))])
    shown = training_prompt(tags[int(rng.integers(len(tags)))], rng)
    captioned = training_prompt(shown.tag, rng) if rng.random() < MISALIGNED else shown
    mentioned = _without_one(captioned, rng) if rng.random() < LOOSE else captioned.groups
    clutter = _clutter(shown, rng) if rng.random() < CLUTTERED else None
    return ImperfectScene(shown, captioned, mentioned, clutter)


def _scene_row(rng: np.random.Generator, background: tuple[int, int, int]) -> dict:
    scene = imperfect_scene(rng)
    references = [render(lay_out_reference(group), background) for group in scene.captioned.references]
    image = render(scene.objects, background)
    return {"instruction": scene.caption, "reference_images": references, "image": image, "answer": None}


def _without_one(prompt: ShapesPrompt, rng: np.random.Generator) -> tuple[ShapeGroup, ...]:
    """Returns the groups without one of them; all if the caption cannot be shortened or would be held out."""
    if part_of(prompt.tag) != "instruction_following" or len(prompt.groups) < 2:
        return prompt.groups
    left_out = int(rng.integers(len(prompt.groups)))
    kept = tuple(group for index, group in enumerate(prompt.groups) if index != left_out)
    return prompt.groups if is_held_out(kept) else kept


def _clutter(prompt: ShapesPrompt, rng: np.random.Generator) -> SceneObject | None:
    """Returns an object of another shape in an empty cell; None if the image would be held out."""
    objects = lay_out(prompt.groups)
    shapes = [shape for shape in SHAPES if shape not in {thing.shape for thing in objects}]
    shape, colour = shapes[int(rng.integers(len(shapes)))], list(COLOURS)[int(rng.integers(len(COLOURS)))]
    taken = {(thing.row, thing.column) for thing in objects}
    empty = [(row, column) for row in range(GRID) for column in range(GRID) if (row, column) not in taken]
    row, column = empty[int(rng.integers(len(empty)))]
    if is_held_out([*prompt.groups, ShapeGroup(shape, colour)]):
        return None
    return SceneObject(shape, colour, row, column)


def _name(group: ShapeGroup) -> str:
    return f"a {group.colour} {group.shape}" if group.colour else f"a {group.shape}"
