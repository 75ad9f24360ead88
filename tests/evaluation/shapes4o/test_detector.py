"""The detector against what was drawn, and the strictness of its judgement."""

import re

import numpy as np
import pytest

from echo4o.evaluation.benchmarks.shapes4o.accuracy import Accuracy, scores_by_tag, wilson
from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.grammar import TAGS, training_prompt
from echo4o.evaluation.benchmarks.shapes4o.rendering import render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import COLOURS, SHAPES, SIZES, SceneObject, ShapeGroup, lay_out


def _truth(objects):
    return sorted((o.shape, o.colour, o.row, o.column, o.size) for o in objects)


def _seen(found):
    return sorted((str(o.shape), o.colour, o.row, o.column, o.size) for o in found)


@pytest.mark.long
def test_right_on_rendered_truth():
    rng = np.random.default_rng(0)
    right = 0
    for index in range(360):
        prompt = training_prompt(TAGS[index % len(TAGS)], rng)
        objects = lay_out(prompt.groups, ("prompt", "free")[index % 2], rng)
        found = detect(render(objects, tint(index)))
        right += _seen(found) == _truth(objects) and check(prompt.groups, found)[0]
    assert right >= 0.99 * 360


def test_right_on_crowded_scenes():
    rng = np.random.default_rng(1)
    right = 0
    for _ in range(100):
        cells = rng.choice(16, int(rng.integers(0, 13)), replace=False)
        words = [
            [words[i] for i in rng.integers(len(words), size=len(cells))] for words in (SHAPES, [*COLOURS], [*SIZES])
        ]
        objects = [
            SceneObject(shape, colour, int(cell) // 4, int(cell) % 4, size)
            for shape, colour, size, cell in zip(*words, cells)
        ]
        right += _seen(detect(render(objects))) == _truth(objects)
    assert right >= 99


def test_two_toned_things_are_no_objects():
    pixels = np.array(render([SceneObject("square", "red", 0, 0)]))
    pixels[8:16] = np.asarray(render([SceneObject("square", "blue", 0, 0)]))[8:16]
    assert not check([ShapeGroup("square", "red")], detect(pixels))[0]
    assert [thing.shape for thing in detect(pixels)] == [None, None]
    assert "a red thing of no clear shape at (8, 5)" in check([ShapeGroup("square")], detect(pixels))[1]


def test_an_empty_image_has_no_objects():
    assert detect(render([])) == []
    assert check([ShapeGroup("star")], []) == (False, ["0 x star, asked for 1"])


@pytest.mark.parametrize(
    ("asked", "drawn", "reason"),
    [
        ([ShapeGroup("star", None, 2)], [("star", "red", 0, 0)], "1 x star, asked for 2"),
        ([ShapeGroup("star")], [("star", "red", 0, 0), ("star", "red", 0, 1)], "2 x star, asked for 1"),
        ([ShapeGroup("star", "red")], [("star", "blue", 0, 0)], "an unasked blue star"),
        ([ShapeGroup("star")], [("star", "red", 0, 0), ("heart", "red", 3, 3)], "an unasked red heart"),
        ([ShapeGroup("star", None, 1, "left")], [("star", "red", 0, 3)], "star at .* is not left"),
        ([ShapeGroup("star", None, 1, "below")], [("star", "red", 0, 3)], "star at .* is not below"),
        (
            [ShapeGroup("star", size="large"), ShapeGroup("heart", size="small")],
            [("star", "red", 0, 0), ("heart", "red", 1, 0)],
            "the larger is .* times the smaller",
        ),
        (
            [ShapeGroup("star", "red", 1, "beside"), ShapeGroup("heart", "red", 1, "beside")],
            [("star", "red", 0, 0), ("heart", "red", 1, 1)],
            "16 across and 1[567] down: not beside",
        ),
        (
            [ShapeGroup("star", "red", 1, "beside"), ShapeGroup("heart", "red", 1, "beside")],
            [("star", "red", 0, 0), ("heart", "red", 0, 3)],
            "48 across and . down: not beside",
        ),
    ],
)
def test_the_error_names_what_is_wrong(asked, drawn, reason):
    ok, reasons = check(asked, detect(render(SceneObject(*of) for of in drawn)))
    assert not ok
    assert any(re.search(reason, line) for line in reasons), reasons


def test_only_what_is_stated_counts():
    found = detect(render([SceneObject("star", "purple", 3, 2, "small")]))
    assert check([ShapeGroup("star")], found) == (True, [])


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="32 x 32; it must be 64 x 64"):
        detect(np.zeros((32, 32, 3), np.uint8))


def test_wilson_intervals():
    assert wilson(0, 70) == (pytest.approx(0.0), pytest.approx(0.0520, abs=1e-4))
    assert wilson(50, 70) == (pytest.approx(0.5995, abs=1e-3), pytest.approx(0.8068, abs=1e-3))
    assert wilson(10, 10) == (pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0))
    with pytest.raises(ValueError, match="3 right of 2"):
        wilson(3, 2)


def test_scores_by_tag():
    scores = scores_by_tag(["count", "colour", "count"], [True, False, False])
    assert scores == {"count": Accuracy(1, 2), "colour": Accuracy(0, 1), "overall": Accuracy(1, 3)}
    assert str(scores["count"]).startswith("0.50 [0.09, 0.91]")
