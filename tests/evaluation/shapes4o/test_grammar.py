"""The grammar, and that no held-out content is ever trained on, whatever its order of mention."""

import json
import re

import numpy as np
import pytest

from echo4o.evaluation.benchmarks.shapes4o import grammar as prompts
from echo4o.evaluation.benchmarks.shapes4o.grammar import (
    TAGS,
    captions,
    content,
    held_out_prompts,
    is_held_out,
    training_prompt,
)
from echo4o.evaluation.benchmarks.shapes4o.scene import COLOURS, SHAPES, TYPICAL_COLOUR, ShapeGroup, lay_out
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream

NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
SIZE_WORDS = {"larger": "large", "giant": "large", "smaller": "small", "tiny": "small"}


def parsed(text: str) -> frozenset:
    """The content of an instruction, read from its words alone: a second opinion on the grammar."""
    words = r"(?P<number>\w+) (?:(?P<size>larger|smaller|giant|tiny) )?(?:(?P<colour>%s) )?(?P<shape>%s)(?:e?s)?"
    place = r"(?: (?:on the )?(?P<region>left|right|above|below))?"
    found = set()
    for thing in re.split(r", | and ", text.removeprefix("a photo of ")):
        thing = thing.split(" instead of ")[0]
        thing, _, lender = thing.partition(" in the colour of a ")
        match = re.fullmatch(words % ("|".join(COLOURS), "|".join(SHAPES)) + place, thing)
        shape = match["shape"]
        colour = TYPICAL_COLOUR[lender or shape] if match["colour"] is None else match["colour"]
        size = SIZE_WORDS.get(match["size"])
        found.add((shape, colour, NUMBERS[match["number"]], match["region"], size))
    return frozenset(found)


def test_held_out_prompts_are_many_distinct_and_fixed():
    held_out = held_out_prompts()
    assert len(held_out) == 90 and {p.tag for p in held_out} == set(TAGS)
    assert len({content(p.groups) for p in held_out}) == 90
    assert held_out_prompts() == held_out
    assert held_out_prompts(["count"]) == [p for p in held_out if p.tag == "count"]


@pytest.mark.parametrize("tag", [tag for tag in TAGS if tag != "multi_reference"])
def test_words_say_the_content(tag):
    rng = np.random.default_rng(0)
    for prompt in [training_prompt(tag, rng) for _ in range(200)] + held_out_prompts([tag]):
        assert parsed(prompt.text) == content(prompt.groups), prompt


def test_content_has_no_order_and_knows_typical_colours():
    star, heart = ShapeGroup("star", "yellow"), ShapeGroup("heart")
    assert content([star, heart]) == content([heart, ShapeGroup("star")])
    assert content([star]) != content([ShapeGroup("star", "red")]) != content([ShapeGroup("star", "red", count=2)])


def test_reordered_held_out_contents_are_held_out():
    for prompt in held_out_prompts():
        assert is_held_out(prompt.groups) and is_held_out(prompt.groups[::-1])
    assert is_held_out([ShapeGroup("square", "purple", 3)])  # "three squares", its typical colour stated


def test_no_training_prompt_is_held_out():
    for tag in TAGS:
        for groups in prompts._trainable(tag):
            assert not is_held_out(groups), groups
        rng = np.random.default_rng(1)
        assert not any(is_held_out(training_prompt(tag, rng).groups) for _ in range(300))


def test_no_row_of_the_data_set_is_held_out(tmp_path):
    render_upstream(tmp_path, {"surreal_fantasy": 200, "instruction_following": 1400})
    held_out = {parsed(p.text) for p in held_out_prompts() if not p.references}
    rows = [json.loads(line) for file in tmp_path.glob("*/*.jsonl") for line in file.read_text().splitlines()]
    assert len(rows) == 1600
    assert not [row["instruction"] for row in rows if parsed(row["instruction"]) in held_out]


def test_every_shape_and_number_can_be_learned():
    left = {(groups[0].shape, groups[0].count) for groups in prompts._trainable("count")}
    for held_out in held_out_prompts(["count"]):
        group = held_out.groups[0]
        assert (
            sum(count == group.count for _, count in left) >= 2 and sum(shape == group.shape for shape, _ in left) >= 2
        )


def test_layout_by_prompt():
    groups = [ShapeGroup("star", "red"), ShapeGroup("heart", None, 2)]
    assert [(o.row, o.column) for o in lay_out(groups)] == [(0, 0), (1, 0), (1, 1)]
    groups = [ShapeGroup("star", None, 2, "below"), ShapeGroup("heart", None, 1, "above")]
    assert [(o.row, o.column) for o in lay_out(groups)] == [(3, 0), (3, 1), (0, 0)]
    with pytest.raises(ValueError, match="does not fit"):
        lay_out([ShapeGroup("star", None, 8), ShapeGroup("heart", None, 8), ShapeGroup("cross")])


@pytest.mark.parametrize("tag", TAGS)
def test_free_layout_keeps_the_relations(tag):
    rng = np.random.default_rng(2)
    for _ in range(50):
        prompt = training_prompt(tag, rng)
        objects = lay_out(prompt.groups, "free", rng)
        assert len({(o.row, o.column) for o in objects}) == len(objects) == sum(g.count for g in prompt.groups)
        regions = [group.region for group in prompt.groups for _ in range(group.count)]
        for region, thing in zip(regions, objects):
            assert {"left": thing.column < 2, "right": thing.column > 1}.get(region, True)
            assert {"above": thing.row < 2, "below": thing.row > 1}.get(region, True)


def test_bad_words_are_named():
    with pytest.raises(ValueError, match="shape is 'moon'; allowed are heart, star"):
        ShapeGroup("moon")
    with pytest.raises(ValueError, match="tag is 'poem'; allowed are colour, count"):
        training_prompt("poem", np.random.default_rng(0))
    with pytest.raises(ValueError, match="layout is 'grid'; allowed are prompt, free"):
        lay_out([ShapeGroup("star")], "grid")
    with pytest.raises(ValueError, match="needs rng"):
        lay_out([ShapeGroup("star")], "free")


def test_captions_hold_no_held_out_content():
    held_out = {parsed(p.text) for p in held_out_prompts() if not p.references}
    texts = captions(900)
    assert not [text for text in texts if "picture 1" not in text and parsed(text) in held_out]
