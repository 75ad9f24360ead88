"""Plans all rows before the first paid call. The same recipe plans the same rows; more rows keep the earlier ones."""

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
_MAX_SAMPLES = 50  # attempts to find a sketch that no earlier row has


class Chain(Protocol):
    """One of the three parts: samples sketches and writes their instructions."""

    part: str

    def hashes(self) -> dict[str, str]:
        """Returns hashes of the vocabularies and images from which it samples."""
        ...

    def sketch(self, number: int, rng: random.Random) -> dict:
        """Samples everything random about a row."""
        ...

    async def instruct(self, task: PlannedRow, steps: RowSteps) -> Instruction:
        """Writes the instruction of a sketch."""
        ...


def load_chains(recipe: SynthesisRecipe) -> dict[str, Chain]:
    """Loads the parts that have rows. Raises ValueError if words or images are missing."""
    return {part: _LOADERS[part].load(getattr(recipe, part)) for part, rows in recipe.rows.items() if rows}


def make_tasks(recipe: SynthesisRecipe, chains: dict[str, Chain]) -> list[PlannedRow]:
    """Plans the rows of all parts. Raises ValueError if a reference image cannot be decoded."""
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
        attempt = 0
        while True:
            rng = random.Random(f"{recipe.seed} {chain.part} {number} {attempt}")
            sketch = chain.sketch(number, rng)
            content = json.dumps(_content(sketch), sort_keys=True, default=str)
            attempt += 1
            if content not in seen or attempt == _MAX_SAMPLES:
                break
        seed = random.Random(f"{recipe.seed} {chain.part} {number}").getrandbits(31)
        yield PlannedRow(chain.part, number, seed, sketch, repeats=content in seen)
        seen.add(content)


def _content(sketch: dict) -> dict:
    """Returns the parts of a sketch by which duplicates are found; the template is not among them."""
    content = {key: value for key, value in sketch.items() if key != "template"}
    return content | ({"values": sketch["values"][:1]} if "values" in sketch else {})
