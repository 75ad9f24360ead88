"""The training rows of the quickstart's base model: what is imperfect about them, and what they never show."""

import numpy as np
import pytest

from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.grammar import (
    TAGS,
    held_out_contents,
    held_out_prompts,
    is_held_out,
    part_of,
)
from echo4o.evaluation.benchmarks.shapes4o.rendering import render
from echo4o.evaluation.benchmarks.shapes4o.scene import ShapeGroup, lay_out
from echo4o.quickstart.imperfect_rows import (
    CLUTTERED,
    LOOSE,
    MISALIGNED,
    imperfect_rows,
    imperfect_scene,
    single_object_prompts,
    single_objects,
)

NUMBER = 4000


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(0)
    return [imperfect_scene(rng) for _ in range(NUMBER)]


def test_rows_are_mixed_and_repeatable():
    rows = imperfect_rows(100, seed=0)
    assert len({row["id"] for row in rows}) == 100
    assert sum(row["answer"] is not None for row in rows) == 5
    assert any(len(row["reference_images"]) == 2 and row["image"] for row in rows)
    again = imperfect_rows(40, seed=0)
    assert [row["instruction"] for row in again] == [row["instruction"] for row in rows[:40]]
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(again, rows) if a["image"])
    assert rows[0]["id"] != imperfect_rows(1, seed=1)[0]["id"]


def test_shares_of_imperfect_scenes(scenes):
    def share(happens, among=scenes) -> float:
        return sum(map(bool, map(happens, among))) / len(among)

    assert {scene.shown.tag for scene in scenes} == set(TAGS)
    assert all(scene.captioned.tag == scene.shown.tag for scene in scenes)
    assert share(lambda scene: scene.captioned is not scene.shown) == pytest.approx(MISALIGNED, abs=0.03)
    several = [s for s in scenes if part_of(s.shown.tag) == "instruction_following" and len(s.captioned.groups) > 1]
    assert share(lambda scene: scene.mentioned != scene.captioned.groups, several) == pytest.approx(LOOSE, abs=0.03)
    assert share(lambda scene: scene.clutter) == pytest.approx(CLUTTERED, abs=0.03)


def test_the_detector_sees_what_is_imperfect(scenes):
    """Without misalignment, omission and clutter an image shows exactly its caption; with clutter it does not."""
    exact = [s for s in scenes if s.captioned is s.shown and s.mentioned == s.shown.groups and s.clutter is None]
    cluttered = [s for s in scenes if s.clutter is not None]
    assert all(check(s.captioned.groups, detect(render(s.objects)))[0] for s in exact[:100])
    assert not any(check(s.shown.groups, detect(render(s.objects)))[0] for s in cluttered[:100])
    cells = [[(thing.row, thing.column) for thing in scene.objects] for scene in scenes]
    assert all(len(set(taken)) == len(taken) for taken in cells)


def test_no_caption_and_no_image_is_held_out(scenes):
    assert not {p.text for p in held_out_prompts() if not p.references} & {scene.caption for scene in scenes}
    for scene in scenes:
        clutter = [ShapeGroup(scene.clutter.shape, scene.clutter.colour)] if scene.clutter else []
        assert not is_held_out(scene.mentioned) and not is_held_out([*scene.shown.groups, *clutter])
        assert not is_held_out(scene.captioned.groups)


def test_single_objects_are_exact():
    assert all(not is_held_out([group]) for group in single_objects())
    assert any(len(of) == 1 for of in held_out_contents()), "then the check above checks something"
    prompts = single_object_prompts(10)
    assert all(check(p.groups, detect(render(lay_out(p.groups))))[0] for p in prompts)
