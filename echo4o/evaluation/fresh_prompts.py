"""New GenEval++ prompts with the tags and statistics of the official ones, for evaluation that nobody trained on.

The statistics (how many objects, which counts, how often each pair of regions) are those of the official set; the
objects are COCO's 80 classes under GenEval's names; contents are sampled anew. The wording is
that of the official templates, without their mistakes in English ("one cats", "couchs").
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from echo4o.common import strict_json

PER_TAG = 40
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
_PLURALS = {
    "person": "people",
    "sheep": "sheep",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
    "knife": "knives",
    "broccoli": "broccoli heads",
    "computer mouse": "computer mice",
}
_SINGULARS = {"skis": "pair of skis", "scissors": "pair of scissors", "broccoli": "broccoli head"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
# How often each value occurs in the 40 official prompts of a tag.
_COUNTING = {4: 10, 5: 11, 6: 7, 7: 12}
_COLOUR_COUNTS = {
    (3, 1): 10, (2, 2): 7, (1, 1): 5, (1, 2): 5, (2, 1): 4, (3, 2): 3, (1, 3): 2, (3, 3): 2, (2, 3): 2,
}  # fmt: skip
_PLACE_COUNTS = {(2, 3): 8, (2, 2): 8, (3, 3): 6, (1, 1): 5, (3, 2): 4, (3, 1): 3, (1, 2): 3, (1, 3): 3}
_MULTI_COUNT = {1: 24, 2: 41, 3: 36}
_UPRIGHT = {"color_spatial_attr": 26, "spatial_count_attr": 21, "size_spatial_attr": 23}  # above / below


def make_genevalpp(seed: int, exclude: Iterable[dict] = ()) -> list[dict]:
    """280 rows of a GenEval++ prompt file.

    Args:
        seed: the same seed gives the same rows.
        exclude: rows whose contents, in any order, must not appear again, for example the official ones.
    """
    rng = np.random.default_rng(seed)
    taken = {content(row) for row in exclude}
    rows = []
    for tag, make in _TAGS.items():
        for plan in make(rng):
            rows.append(_sample_row(tag, plan, rng, taken))
    return rows


def content(row: dict) -> frozenset:
    """The objects, counts, colours, regions and sizes of a row, without their order."""
    names = ("class", "count", "color", "region", "size")
    return frozenset(tuple(item.get(name) for name in names) for item in row["include"])


def write_prompts(rows: Sequence[dict], path: Path) -> None:
    from echo4o.common.files import write_text

    write_text(path, "".join(f"{strict_json.dumps(row)}\n" for row in rows))


def _sample_row(tag: str, plan: list[dict], rng: np.random.Generator, taken: set) -> dict:
    """Fill a plan with objects and colours until its content is new."""
    for _ in range(10_000):
        classes = rng.choice(len(CLASSES), len(plan), replace=False)
        colours = rng.choice(len(COLOURS), len(plan), replace=False)
        include = []
        for item, of_class, of_colour in zip(plan, classes, colours):
            filled = {"class": CLASSES[of_class], "count": item["count"]}
            if "color" in item:
                filled["color"] = COLOURS[of_colour]
            include.append(filled | {name: item[name] for name in ("size", "region") if name in item})
        row = {"tag": tag, "include": include}
        if tag == "counting":
            row["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
        clash = any(item["class"] == item.get("color") for item in include)  # "an orange orange" tests nothing
        if not clash and content(row) not in taken:
            taken.add(content(row))
            return row | {"prompt": f"A photo of {_text(tag, include)}"}
    raise ValueError(f"{tag}: every content with this structure is taken; exclude fewer prompts")


def _shuffled(counts: dict, rng: np.random.Generator) -> list:
    values = [value for value, times in counts.items() for _ in range(times)]
    return [values[i] for i in rng.permutation(len(values))]


def _regions(tag: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    upright = _UPRIGHT[tag]
    return _shuffled({("above", "below"): upright, ("left", "right"): PER_TAG - upright}, rng)


def _color_attr(rng):
    for number in _shuffled({3: 30, 4: 10}, rng):
        yield [{"count": 1, "color": True} for _ in range(number)]


def _counting(rng):
    for count in _shuffled(_COUNTING, rng):
        yield [{"count": count}]


def _color_count_attr(rng):
    for counts in _shuffled(_COLOUR_COUNTS, rng):
        yield [{"count": count, "color": True} for count in counts]


def _color_spatial_attr(rng):
    for regions in _regions("color_spatial_attr", rng):
        yield [{"count": 1, "color": True, "region": region} for region in regions]


def _spatial_count_attr(rng):
    for regions, counts in zip(_regions("spatial_count_attr", rng), _shuffled(_PLACE_COUNTS, rng)):
        yield [{"count": count, "region": region} for count, region in zip(counts, regions)]


def _size_spatial_attr(rng):
    for regions in _regions("size_spatial_attr", rng):
        yield [{"count": 1, "size": s, "region": region} for s, region in zip(("larger", "smaller"), regions)]


def _multi_object_count_attr(rng):
    counts = iter(_shuffled(_MULTI_COUNT, rng))
    for number in _shuffled({2: 19, 3: 21}, rng):
        yield [{"count": next(counts)} for _ in range(number)]


_TAGS = {
    "color_attr": _color_attr,
    "counting": _counting,
    "color_count_attr": _color_count_attr,
    "color_spatial_attr": _color_spatial_attr,
    "spatial_count_attr": _spatial_count_attr,
    "size_spatial_attr": _size_spatial_attr,
    "multi_object_count_attr": _multi_object_count_attr,
}


def _text(tag: str, include: list[dict]) -> str:
    spatial = tag in _UPRIGHT
    parts = [
        _phrase(item, counted="count" in tag) + (f" on the {item['region']}" if spatial else "") for item in include
    ]
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _phrase(item: dict, counted: bool) -> str:
    """A part of the prompt: "two red cups", "a larger cat", "an orange tie"."""
    adjectives = " ".join(item[name] for name in ("size", "color") if name in item)
    if counted:
        noun = plural(item["class"]) if item["count"] > 1 else _SINGULARS.get(item["class"], item["class"])
        return " ".join(filter(None, (_NUMBERS[item["count"]], adjectives, noun)))
    return with_article(item["class"], adjectives)


def with_article(name: str, color: str = "") -> str:
    """ "a cat", "an orange tie", "a pair of scissors", "a red pair of skis"."""
    words = f"{color} {_SINGULARS.get(name, name)}".strip()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """The plural of a class, also where the official templates are wrong."""
    if name in _PLURALS:
        return _PLURALS[name]
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"
