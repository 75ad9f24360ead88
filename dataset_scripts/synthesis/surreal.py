"""Surreal fantasy: takes a common object and its usual properties, and writes an instruction that breaks one of them."""

import random
from dataclasses import dataclass
from typing import Any

from echo4o.dataset_scripts.synthesis import vocabulary, wording
from echo4o.dataset_scripts.synthesis.calls import UnusableAnswer
from echo4o.dataset_scripts.synthesis.recipe import SurrealFantasySettings
from echo4o.dataset_scripts.synthesis.rows import (
    Instruction,
    PlannedRow,
    RowSteps,
    article,
    json_object,
    listed,
    one_line,
)
from echo4o.dataset_scripts.synthesis.vocabulary import Vocabulary, holds

PROPERTIES = ("colour", "shape", "size", "material", "surroundings", "time")
CATEGORIES = {
    "colour": "attribute_shift",
    "shape": "attribute_shift",
    "size": "attribute_shift",
    "material": "hybridization",
    "combination": "hybridization",
    "time": "spatiotemporal_anomaly",
    "environment": "spatiotemporal_anomaly",
    "several": "several_objects",
}
_LISTS = {
    "shape": "shapes",
    "size": "sizes",
    "material": "materials",
    "time": "times",
    "environment": "places",
}


@dataclass(frozen=True)
class SurrealFantasyChain:
    """The settings of this part with their vocabularies."""

    recipe: SurrealFantasySettings
    objects: Vocabulary
    colours: Vocabulary

    part = "surreal_fantasy"

    @classmethod
    def load(cls, recipe: SurrealFantasySettings) -> "SurrealFantasyChain":
        colours = vocabulary.load("colours", recipe.colours, least=3)
        return cls(recipe, vocabulary.load("objects", recipe.objects, least=3), colours)

    def hashes(self) -> dict[str, str]:
        return {"objects": self.objects.sha256, "colours": self.colours.sha256}

    def sketch(self, number: int, rng: random.Random) -> dict:
        """Samples the objects, the kind of break, and its possible values in order of preference."""
        kind = self.recipe.breaks[number % len(self.recipe.breaks)]
        count = {"combination": 2, "several": rng.choice((2, 3))}.get(kind, 1)
        values = list(self.colours.words if kind in ("colour", "several") else ())
        if kind in _LISTS:
            values = list(vocabulary.shipped(_LISTS[kind]).words)
        rng.shuffle(values)
        return {"break": kind, "objects": rng.sample(self.objects.words, count), "values": values}

    async def instruct(self, task: PlannedRow, steps: RowSteps) -> Instruction:
        """Writes the instruction of a sketch."""
        sketch = task.sketch
        steps.keep("objects", result={"objects": sketch["objects"], "break": sketch["break"]})
        known = {thing: await self._properties(thing, steps) for thing in sketch["objects"]}
        values = _values(sketch, known)
        note, must, include = _break(sketch, values)
        steps.keep("break", result={"note": note, "values": values})
        usual = "; ".join(
            f"{thing}: {', '.join(f'{k} {v}' for k, v in usual_values.items())}"
            for thing, usual_values in known.items()
        )
        prompt = wording.SURREAL.format(usual=usual, note=note, must=listed([f'"{word}"' for word in must]))
        text = await steps.write("instruction", prompt, lambda answer: _holding(answer, must))
        facts = {
            "break": sketch["break"], "objects": sketch["objects"], "properties": known, "values": values, "note": note,
        }  # fmt: skip
        if include:
            facts["structure"] = {"include": list(include), "exclude": []}
        return Instruction(text, CATEGORIES[sketch["break"]], include, note, facts=facts)

    async def _properties(self, thing: str, steps: RowSteps) -> dict[str, str]:
        prompt = wording.PROPERTIES.format(thing=thing)
        return await steps.write(
            f"properties of {thing}", prompt, lambda answer: json_object(answer, PROPERTIES), shared=True
        )


def _values(sketch: dict[str, Any], known: dict[str, dict[str, str]]) -> list[str]:
    """Returns the first unusual value for each object. Raises UnusableAnswer if all values are usual."""
    kind: str = sketch["break"]
    if kind == "combination":
        return []
    about: str = {"environment": "surroundings", "several": "colour"}.get(kind, kind)
    values, chosen = list(sketch["values"]), []
    for thing in sketch["objects"]:
        unusual = [value for value in values if not holds(known[thing][about], value)]
        if not unusual:
            raise UnusableAnswer(f"nothing in the list would be a break: {known[thing][about]!r} is usual of {thing}")
        chosen.append(unusual[0])
        values.remove(chosen[-1])
    return chosen


def _break(sketch: dict, values: list[str]) -> tuple[str, list[str], tuple[dict, ...]]:
    """Returns the break in words, the words that the instruction must contain, and its structure if it has one."""
    things, kind = sketch["objects"], sketch["break"]
    a = article(things[0])
    if kind in ("colour", "several"):
        items = [{"class": thing, "count": 1, "color": value} for thing, value in zip(things, values)]
        never = "a colour that it never has" if len(things) == 1 else "colours that they never have"
        note = listed([f"{article(f'{value} {thing}')}" for thing, value in zip(things, values)])
        return (
            f"there is exactly {note}, {never}",
            [f"{v} {t}" for t, v in zip(things, values)],
            tuple(items),
        )
    if kind == "combination":
        other = things[1]
        return f"{a} and {article(other)} have grown together into one single thing", things, ()
    value = values[0]
    note = {
        "shape": f"{a} has the shape of {article(value)}",
        "size": f"{a} is {value}, which its surroundings show",
        "material": f"{a} is made of {value}",
        "time": f"{a} appears in {value}, where it cannot belong",
        "environment": f"{a} is found at {value}, where it never is",
    }[kind]
    return note, [things[0], _telling(kind, value)], ()


def _telling(kind: str, value: str) -> str:
    """Returns the part of a value that the instruction must contain."""
    return vocabulary.shipped(_LISTS[kind]).plurals.get(value, value)


def _holding(answer: str, must: list[str]) -> str:
    text = one_line(answer)
    for words in must:
        if not holds(text, words):
            raise UnusableAnswer(f'the instruction lost "{words}"')
    return text
