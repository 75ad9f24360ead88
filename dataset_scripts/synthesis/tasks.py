"""Every row is decided before anything is paid for: the same recipe plans the same rows, and more rows keep the first."""

import json
import random
from collections.abc import Iterator
from typing import Protocol

from echo4o.dataset_scripts.synthesis.combining import MultiReferenceChain
from echo4o.dataset_scripts.synthesis.following import InstructionFollowingChain
from echo4o.dataset_scripts.synthesis.recipe import SynthesisRecipe
from echo4o.dataset_scripts.synthesis.rows import Instruction, PlannedRow, RowSteps
from echo4o.dataset_scripts.synthesis.surreal import SurrealFantasyChain

_LOADERS = {
    "surreal_fantasy": SurrealFantasyChain,
    "multi_reference": MultiReferenceChain,
    "instruction_following": InstructionFollowingChain,
}
_SAMPLED_AGAIN = 50


class Chain(Protocol):
    """One of the three recipes."""

    part: str

    def hashes(self) -> dict[str, str]:
        """Of the words and pictures that it draws from."""

    def sketch(self, number: int, rng: random.Random) -> dict:
        """All that chance decides about a row."""

    async def instruct(self, task: PlannedRow, steps: RowSteps) -> Instruction:
        """From the sketch to the instruction."""


def load_chains(recipe: SynthesisRecipe) -> dict[str, Chain]:
    """The parts that have rows, with their words and pictures; ValueError says which are missing."""
    return {part: _LOADERS[part].load(getattr(recipe, part)) for part, rows in recipe.rows.items() if rows}


def make_tasks(recipe: SynthesisRecipe, chains: dict[str, Chain]) -> list[PlannedRow]:
    """The rows of all parts; references are decoded once, so that a broken one is told now."""
    tasks = []
    for part, chain in chains.items():
        for task in _of_part(recipe, chain, recipe.rows[part]):
            if isinstance(chain, MultiReferenceChain):
                chain.check(task)
            tasks.append(task)
    return tasks


def _of_part(recipe: SynthesisRecipe, chain: Chain, rows: int) -> Iterator[PlannedRow]:
    seen: set[str] = set()
    for number in range(rows):
        for attempt in range(_SAMPLED_AGAIN):  # what was planned before is not planned again, where there is a choice
            rng = random.Random(f"{recipe.seed} {chain.part} {number} {attempt}")
            sketch = chain.sketch(number, rng)
            known = json.dumps(_content(sketch), sort_keys=True, default=str)
            if known not in seen:
                break
        seed = random.Random(f"{recipe.seed} {chain.part} {number}").getrandbits(31)
        yield PlannedRow(chain.part, number, seed, sketch, repeats=known in seen)
        seen.add(known)


def _content(sketch: dict) -> dict:
    """What makes two sketches the same, whatever frame their words are in."""
    content = {key: value for key, value in sketch.items() if key != "template"}
    return content | ({"values": sketch["values"][:1]} if "values" in sketch else {})
