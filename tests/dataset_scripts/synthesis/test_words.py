"""Structures and their words: what a paraphrase may change, and what it must keep."""

import random

import pytest

from echo4o.dataset_scripts.synthesis import vocabulary
from echo4o.dataset_scripts.synthesis.calls import UnusableAnswer
from echo4o.dataset_scripts.synthesis.following import InstructionFollowingChain
from echo4o.dataset_scripts.synthesis.gates import ImageGates, RowRejected
from echo4o.dataset_scripts.synthesis.plan import make_plan
from echo4o.dataset_scripts.synthesis.recipe import (
    TAGS,
    GatesSettings,
    InstructionFollowingSettings,
    bundled_names,
    load_recipe,
)
from echo4o.dataset_scripts.synthesis.surreal import PROPERTIES, _values
from echo4o.dataset_scripts.synthesis.tasks import load_chains, make_tasks
from echo4o.evaluation.benchmarks.genevalpp import GenEvalPP
from tests.dataset_scripts.synthesis.artist import reference

FOLLOWING = InstructionFollowingChain.load(InstructionFollowingSettings(rows=1))
CUPS = [
    {"class": "cup", "count": 2, "color": "red", "region": "left"},
    {"class": "knife", "count": 1, "color": "blue", "region": "right"},
]


def test_phrases():
    assert [FOLLOWING.phrase(item) for item in CUPS] == ["two red cups on the left", "a blue knife on the right"]
    assert FOLLOWING.phrase({"class": "knife", "count": 3}) == "three knives"
    assert FOLLOWING.phrase({"class": "apple", "count": 1, "size": "larger"}) == "a larger apple"


@pytest.mark.parametrize(
    "answer",
    [
        "On a bare surface stand two red cups on the left and a blue knife on the right.",
        '"A blue knife on the right, two red cups on the left: nothing else but a plain backdrop"',
    ],
)
def test_a_paraphrase_that_keeps_the_structure(answer):
    assert FOLLOWING.checked(answer, CUPS) == answer.strip('"')


@pytest.mark.parametrize(
    "answer, why",
    [
        ("Two red cups on the left.", '"a blue knife on the right" stands 0 times'),
        ("Two blue cups on the left and a red knife on the right.", "stands 0 times"),
        ("Three red cups on the left and a blue knife on the right.", "stands 0 times"),
        ("Two red cups on the right and a blue knife on the left.", "stands 0 times"),
        ("Two red cups on the left, then two red cups on the left and a blue knife on the right.", "stands 2 times"),
        ("Two red cups on the left and a blue knife on the right, on a green table.", '"green" was added'),
        ("Two red cups on the left and a blue knife on the right, beside forks.", '"forks" was added'),
        ("Two red cups on the left and a blue knife on the right, times 4.", '"4" was added'),
        ("Two red cups on the left and a blue knife on the right, above the bottom edge.", '"bottom" was added'),
        ("", "empty"),
        ("word " * 100, "100 words"),
    ],
)
def test_a_paraphrase_that_changes_the_structure(answer, why):
    with pytest.raises(UnusableAnswer, match=why):
        FOLLOWING.checked(answer, CUPS)


def test_every_structure_is_a_prompt_of_genevalpp(tmp_path):
    seen = set()
    for number in range(700):
        sketch = FOLLOWING.sketch(number, random.Random(number))
        row = {"tag": sketch["tag"], "include": sketch["include"], "prompt": sketch["template"]}
        assert GenEvalPP().read_row(row, 1, tmp_path)
        assert FOLLOWING.checked(sketch["template"], sketch["include"])
        assert all(1 <= item["count"] <= 7 for item in sketch["include"])
        seen.add(sketch["tag"])
    assert seen == set(TAGS)


def test_a_break_is_unusual():
    known = {"lemon": dict.fromkeys(PROPERTIES, "Yellow, or green")}
    sketch = {"break": "colour", "objects": ["lemon"], "values": ["yellow", "green", "blue", "red"]}
    assert _values(sketch, known) == ["blue"]
    with pytest.raises(UnusableAnswer, match="is usual of lemon"):
        _values(sketch | {"values": ["green", "yellow"]}, known)


def test_the_plan_is_the_same_every_time_and_has_no_two_equal_rows():
    recipe = load_recipe("first_hundred")
    chains = load_chains(recipe)
    tasks = make_tasks(recipe, chains)
    assert tasks == make_tasks(recipe, chains) and len({task.id for task in tasks}) == 100
    structures = [str(task.sketch["include"]) for task in tasks if "include" in task.sketch]
    assert len(set(structures)) == len(structures) == 60
    assert all(word for word in vocabulary.shipped("objects").words)
    plan = make_plan(recipe, tasks)
    assert 1 < plan.cost() < plan.cost(most=True) < 10


def test_bundled_recipes_load():
    assert bundled_names() == ["first_hundred"]
    assert {name: load_recipe(name).version for name in bundled_names()}


def test_images_that_look_alike():
    gates = ImageGates(load_recipe("first_hundred"), {})
    gates.recipe = gates.recipe.model_copy(update={"gates": GatesSettings(size=False, duplicate_pictures=1.0)})
    red, blue = reference("star", "red", 1), reference("star", "blue", 1)
    _, seen = gates.check("surreal_fantasy", red)
    gates.accept("row-1", seen)
    gates.check("surreal_fantasy", blue)
    gates.check("surreal_fantasy", reference("circle", "red", 900))
    with pytest.raises(RowRejected, match="looks like that of row-1"):
        gates.check("surreal_fantasy", red)
