"""New GenEval prompts with the tags and statistics of the official ones, for evaluation that nobody trained on."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from echo4o.evaluation.benchmarks.geneval.scoring import CLASSES, COLORS
from echo4o.evaluation.fresh_prompts import plural, with_article

# How often each value occurs in the official prompts.
_SINGLE, _TWO, _COLORS, _COLOR_ATTR = 80, 99, 94, 100
_COUNTS = {2: 26, 3: 28, 4: 26}
_RELATIONS = {"below": 28, "right of": 27, "above": 26, "left of": 19}
_NUMBERS = {2: "two", 3: "three", 4: "four"}
_UNCOLORED = "person"  # the official prompts do not colour people
_TRIES = 10_000


def make_geneval(seed: int, exclude: Iterable[dict] = ()) -> list[dict]:
    """553 rows of a GenEval prompt file. Single objects are all 80 classes, as in the official file.

    Args:
        seed: the same seed gives the same rows.
        exclude: rows whose contents must not appear again. Single objects are exempt: there are no other classes.
    """
    rng = np.random.default_rng(seed)
    taken = {content(row) for row in exclude}
    rows = [_row("single_object", f"a photo of {with_article(name)}", {"class": name, "count": 1}) for name in CLASSES]
    rows += [_new(taken, partial(_two_object, rng)) for _ in range(_TWO)]
    rows += [_new(taken, partial(_counting, rng, count)) for count in _shuffled(_COUNTS, rng)]
    rows += [_new(taken, partial(_colored, rng, "colors", 1)) for _ in range(_COLORS)]
    rows += [_new(taken, partial(_position, rng, relation)) for relation in _shuffled(_RELATIONS, rng)]
    rows += [_new(taken, partial(_colored, rng, "color_attr", 2)) for _ in range(_COLOR_ATTR)]
    return rows


def content(row: dict) -> tuple:
    """The objects, counts, colours and positions of a row. Their order counts only if one clause refers to another."""
    clauses = [
        (clause["class"], clause["count"], clause.get("color"), str(clause.get("position")))
        for clause in row["include"]
    ]
    ordered = any("position" in clause for clause in row["include"])
    return tuple(clauses if ordered else sorted(clauses, key=str))


def _new(taken: set, sample_row: Callable[[], dict]) -> dict:
    """Sample rows until one has a new content."""
    for _ in range(_TRIES):
        row = sample_row()
        if content(row) not in taken:
            taken.add(content(row))
            return row
    raise ValueError("every content with this structure is taken; exclude fewer prompts")


def _shuffled(counts: dict, rng: np.random.Generator) -> list:
    values = [value for value, times in counts.items() for _ in range(times)]
    return [values[index] for index in rng.permutation(len(values))]


def _row(tag: str, text: str, *include: dict, **more: list[dict]) -> dict:
    return {"tag": tag, "include": list(include), **more, "prompt": text}


def _classes(rng: np.random.Generator, number: int, colored: bool = False) -> list[str]:
    known = [name for name in CLASSES if not (colored and name == _UNCOLORED)]
    return [known[index] for index in rng.choice(len(known), number, replace=False)]


def _two_object(rng: np.random.Generator) -> dict:
    names = _classes(rng, 2)
    text = f"a photo of {' and '.join(with_article(name) for name in names)}"
    return _row("two_object", text, *({"class": name, "count": 1} for name in names))


def _counting(rng: np.random.Generator, count: int) -> dict:
    (name,) = _classes(rng, 1)
    exclude = [{"class": name, "count": count + 1}]
    text = f"a photo of {_NUMBERS[count]} {plural(name)}"
    return _row("counting", text, {"class": name, "count": count}, exclude=exclude)


def _colored(rng: np.random.Generator, tag: str, number: int) -> dict:
    names = _classes(rng, number, colored=True)
    colors = [COLORS[index] for index in rng.choice(len(COLORS), number, replace=False)]
    if any(name == color for name, color in zip(names, colors)):  # "an orange orange" tests nothing
        return _colored(rng, tag, number)
    text = f"a photo of {' and '.join(with_article(name, color) for name, color in zip(names, colors))}"
    return _row(tag, text, *({"class": n, "count": 1, "color": c} for n, c in zip(names, colors)))


def _position(rng: np.random.Generator, relation: str) -> dict:
    target, subject = _classes(rng, 2)
    text = f"a photo of {with_article(subject)} {relation} {with_article(target)}"
    return _row(
        "position", text, {"class": target, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}
    )
