"""What Shapes-4o asks for: the grammar of its instructions, and the contents that are never trained on.

Seven tags are those of GenEval++; ``multi_reference`` and ``surreal`` stand for the other two parts of Echo-4o-Image.
Contents are held out unordered: "a red star and a blue heart" and "a blue heart and a red star" are one content, and a
held-out content is drawn by no tag and in no order of mention.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, permutations, product

import numpy as np

from echo4o.evaluation.benchmarks.shapes4o.scene import COLOURS, SHAPES, TYPICAL_COLOUR, ShapeGroup

HELD_OUT_PER_TAG = 10
_HELD_OUT_SEED = 4

_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_PLURALS = {"cross": "crosses"}
_COMPARED = {"large": "larger", "small": "smaller"}
_PLACES = {"left": "on the left", "right": "on the right", "above": "above", "below": "below"}

Content = frozenset  # of (shape, drawn colour, count, region, size)


@dataclass(frozen=True)
class ShapesPrompt:
    """An instruction, the objects that it asks for in their order of mention, and what its references show."""

    tag: str
    text: str
    groups: tuple[ShapeGroup, ...]
    references: tuple[ShapeGroup, ...] = ()


def content(groups: Iterable[ShapeGroup]) -> Content:
    """What a picture of the groups shows, whatever the order of mention and whether a typical colour is stated."""
    return frozenset((g.shape, g.drawn_colour, g.count, g.region, g.size) for g in groups)


# --- the contents of each tag: tuples of groups, one order of each ------------------------------------------------


def _colours() -> Iterator[tuple[ShapeGroup, ...]]:
    for number in (2, 3):
        for shapes in combinations(SHAPES, number):
            for colours in product(COLOURS, repeat=number):
                yield tuple(ShapeGroup(shape, colour) for shape, colour in zip(shapes, colours))


def _counts() -> Iterator[tuple[ShapeGroup, ...]]:
    for shape, count in product(SHAPES, range(2, 9)):
        yield (ShapeGroup(shape, count=count),)


def _colours_and_counts() -> Iterator[tuple[ShapeGroup, ...]]:
    for shapes in combinations(SHAPES, 2):
        for colours in product(COLOURS, repeat=2):
            for counts in product(range(1, 5), repeat=2):
                if counts != (1, 1):
                    yield tuple(ShapeGroup(*values) for values in zip(shapes, colours, counts))


def _places() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two shapes and where each one is."""
    for shapes in permutations(SHAPES, 2):
        for regions in (("left", "right"), ("above", "below")):
            yield shapes, regions


def _colours_and_places() -> Iterator[tuple[ShapeGroup, ...]]:
    for shapes, regions in _places():
        for colours in product(COLOURS, repeat=2):
            yield tuple(
                ShapeGroup(shape, colour, 1, region) for shape, colour, region in zip(shapes, colours, regions)
            )


def _places_and_counts() -> Iterator[tuple[ShapeGroup, ...]]:
    for shapes, regions in _places():
        for counts in product(range(1, 4), repeat=2):
            yield tuple(
                ShapeGroup(shape, None, count, region) for shape, count, region in zip(shapes, counts, regions)
            )


def _places_and_sizes() -> Iterator[tuple[ShapeGroup, ...]]:
    for shapes, regions in _places():
        for sizes in (("large", "small"), ("small", "large")):
            yield tuple(
                ShapeGroup(shape, None, 1, region, size) for shape, region, size in zip(shapes, regions, sizes)
            )


def _several_counts() -> Iterator[tuple[ShapeGroup, ...]]:
    for shapes in combinations(SHAPES, 3):
        for counts in product(range(1, 4), repeat=3):
            yield tuple(ShapeGroup(shape, None, count) for shape, count in zip(shapes, counts))


def _pairs_of_references() -> Iterator[tuple[ShapeGroup, ...]]:
    single = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    for pair in combinations(single, 2):
        yield tuple(ShapeGroup(shape, colour, 1, "beside") for shape, colour in pair)


def _surreal() -> Iterator[tuple[ShapeGroup, ...]]:
    for shape, colour in product(SHAPES, COLOURS):
        if colour != TYPICAL_COLOUR[shape]:
            yield (ShapeGroup(shape, colour),)
    for giant, tiny in permutations(SHAPES, 2):
        yield (ShapeGroup(giant, size="large"), ShapeGroup(tiny, size="small"))


@lru_cache
def chance_of_references() -> float:
    """Right share of a model that does all that a multi-reference prompt says, but guesses which two objects."""
    return 1 / sum(1 for _ in _pairs_of_references())


# --- words --------------------------------------------------------------------------------------------------------


def thing(group: ShapeGroup, article: str = "a", size: str | None = None) -> str:
    """The group in words, as in "a red star" or "three crosses"."""
    noun = group.shape if group.count == 1 else _PLURALS.get(group.shape, group.shape + "s")
    number = article if group.count == 1 else _NUMBERS[group.count - 1]
    return " ".join(filter(None, (number, size, group.colour, noun)))


def placed(group: ShapeGroup, article: str = "a") -> str:
    """The group in words with its size and its place, as in "a larger star on the left"."""
    words = thing(group, article, _COMPARED.get(group.size or ""))
    return f"{words} {_PLACES[group.region]}" if group.region else words


def listed(things: Sequence[str]) -> str:
    return f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]


def _say_list(groups, rng) -> str:
    return "a photo of " + listed([thing(group) for group in groups])


def _say_counts(groups, rng) -> str:
    return "a photo of " + listed([thing(group, article="one") for group in groups])


def _say_places(groups, rng) -> str:
    return "a photo of " + listed([placed(group) for group in groups])


def _say_sizes(groups, rng) -> str:
    return "a photo of " + listed([placed(group) for group in groups])


def _say_references(groups, rng) -> str:
    return "the object of picture 1 beside the object of picture 2"


def _say_surreal(groups, rng) -> str:
    if len(groups) == 2:
        degree = {"large": "giant", "small": "tiny"}
        return "a photo of " + listed([f"a {degree[group.size]} {group.shape}" for group in groups])
    (group,) = groups
    usual = TYPICAL_COLOUR[group.shape]
    lender = next(shape for shape, colour in TYPICAL_COLOUR.items() if colour == group.colour)
    ways = (f"a {group.colour} {group.shape} instead of a {usual} one", f"a {group.shape} in the colour of a {lender}")
    return "a photo of " + ways[int(rng.integers(len(ways)))]


@dataclass(frozen=True)
class _Tag:
    contents: Callable[[], Iterator[tuple[ShapeGroup, ...]]]
    say: Callable[[Sequence[ShapeGroup], np.random.Generator], str]
    part: str


_TAGS = {
    "colour": _Tag(_colours, _say_list, "instruction_following"),
    "count": _Tag(_counts, _say_list, "instruction_following"),
    "colour/count": _Tag(_colours_and_counts, _say_counts, "instruction_following"),
    "colour/pos": _Tag(_colours_and_places, _say_places, "instruction_following"),
    "pos/count": _Tag(_places_and_counts, _say_places, "instruction_following"),
    "pos/size": _Tag(_places_and_sizes, _say_sizes, "instruction_following"),
    "multi-count": _Tag(_several_counts, _say_counts, "instruction_following"),
    "multi_reference": _Tag(_pairs_of_references, _say_references, "multi_reference"),
    "surreal": _Tag(_surreal, _say_surreal, "surreal_fantasy"),
}
TAGS = tuple(_TAGS)
PARTS = ("surreal_fantasy", "multi_reference", "instruction_following")


def part_of(tag: str) -> str:
    """The configuration of the dataset that a tag belongs to."""
    return _tag(tag).part


def tags_of(part: str) -> tuple[str, ...]:
    """The tags of one configuration of the dataset."""
    if part not in PARTS:
        raise ValueError(f"part is {part!r}; allowed are {', '.join(PARTS)}")
    return tuple(tag for tag, of in _TAGS.items() if of.part == part)


# --- the split ----------------------------------------------------------------------------------------------------


@lru_cache
def _split(tag: str) -> tuple[tuple[tuple[ShapeGroup, ...], ...], tuple[tuple[ShapeGroup, ...], ...]]:
    """A tag's contents: those that may be trained on, and those of its own held-out prompts."""
    every = list(_tag(tag).contents())
    rng = np.random.default_rng([_HELD_OUT_SEED, TAGS.index(tag)])
    order = rng.permutation(len(every))
    return tuple(every[i] for i in order[HELD_OUT_PER_TAG:]), tuple(every[i] for i in order[:HELD_OUT_PER_TAG])


@lru_cache
def held_out_contents() -> frozenset[Content]:
    """Every content that no training row may show."""
    return frozenset(content(groups) for tag in TAGS for groups in _split(tag)[1])


def is_held_out(groups: Iterable[ShapeGroup]) -> bool:
    """Whether the groups, in any order, are a held-out content: ask before training on anything."""
    return content(groups) in held_out_contents()


@lru_cache
def _trainable(tag: str) -> tuple[tuple[ShapeGroup, ...], ...]:
    # Tags overlap: two objects of typical colours, each once, belong to several of them.
    return tuple(groups for groups in _split(tag)[0] if not is_held_out(groups))


def held_out_prompts(tags: Sequence[str] = TAGS, variant: int = 1) -> list[ShapesPrompt]:
    """The prompts that scores are measured on: ten of each tag, always the same.

    Another `variant` has the same contents in another wording and order of mention.
    """
    prompts = []
    for tag in tags:
        rng = np.random.default_rng([_HELD_OUT_SEED, TAGS.index(tag), variant])
        prompts += [_prompt(tag, groups, rng) for groups in _split(tag)[1]]
    return prompts


def training_prompt(tag: str, rng: np.random.Generator) -> ShapesPrompt:
    """Draws a prompt of a tag, in a random order of mention, whose content is not held out."""
    contents = _trainable(tag)
    return _prompt(tag, contents[int(rng.integers(len(contents)))], rng)


def _prompt(tag: str, groups: Sequence[ShapeGroup], rng: np.random.Generator) -> ShapesPrompt:
    mentioned = tuple(groups[i] for i in rng.permutation(len(groups)))
    shown = tuple(ShapeGroup(g.shape, g.colour) for g in mentioned) if tag == "multi_reference" else ()
    return ShapesPrompt(tag, _TAGS[tag].say(mentioned, rng), mentioned, shown)


def _tag(tag: str) -> _Tag:
    if tag not in _TAGS:
        raise ValueError(f"tag is {tag!r}; allowed are {', '.join(TAGS)}")
    return _TAGS[tag]


def captions(number: int, seed: int = 0) -> list[str]:
    """Instructions of all tags in turn that show no held-out content: what the tokenizer is trained on."""
    rng = np.random.default_rng(seed)
    return [training_prompt(TAGS[i % len(TAGS)], rng).text for i in range(number)]
