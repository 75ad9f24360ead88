"""GenEval++ (arXiv 2508.09987): 280 prompts in 7 tags; an image is correct if it fulfils every expectation."""

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from echo4o.evaluation.benchmarks.base import (
    Aspect,
    Benchmark,
    BenchmarkPrompt,
    PromptSource,
    Verdict,
    known_field,
    text_field,
)
from echo4o.evaluation.metrics.genevalpp import formula

REGIONS = {"left": "left half", "right": "right half", "above": "upper half", "below": "lower half"}
SIZES = {"larger": "clearly larger than the other object", "smaller": "clearly smaller than the other object"}


class Correct(Verdict):
    correct: Literal[0, 1]

    @field_validator("correct", mode="before")
    @classmethod
    def _number(cls, value):
        # Judges without structured outputs write true or "1".
        return (
            {"0": 0, "1": 1}.get(value, value) if isinstance(value, str) else int(value) if value in (0, 1) else value
        )


class GenEvalPP(Benchmark):
    name = "genevalpp"
    title = "GenEval++"
    groups = formula.TAGS
    aspects = (Aspect("correct", "genevalpp.md", Correct),)
    scale = 1.0
    # Another project's notes state this revision, path and checksum; the copy that the tests read has the same one.
    source = PromptSource(
        url="https://raw.githubusercontent.com/yejy53/Echo-4o/{revision}/test_scripts/Geneval%2B%2B.jsonl",
        revision="28f36d76558e5f53b9deceda78bf025ef0d0ea24",
        sha256="9c1216a3f6fe2d99e4ffd63f3a6dba71f3dd7ab30a7c09cb41f03629b35d3e8f",
        count=280,
    )

    def read_row(self, row: dict, number: int, folder: Path) -> BenchmarkPrompt:
        tag, text = known_field(row, "tag", self.groups), text_field(row, "prompt")
        if not row.get("include"):
            raise ValueError('"include" is missing: it lists what the image must show')
        facts = {"include": row["include"], "exclude": row.get("exclude", [])}
        for key, items in facts.items():
            if not isinstance(items, list):
                raise ValueError(f'"{key}" must be a list, it is {items!r}')
            for item in items:
                check_item(item, key)
        return BenchmarkPrompt(str(row.get("id", number)), tag, text, tag, facts)

    def question(self, prompt: BenchmarkPrompt) -> dict[str, Any]:
        return {"instruction": prompt.text, "checklist": checklist(prompt.facts), "tag": prompt.group}

    def sample_score(self, scores: dict[str, float]) -> float:
        return formula.sample_score(scores["correct"])

    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        return formula.aggregates(counts)


def check_item(item: Any, key: str) -> None:
    """Raises ValueError if an entry of "include" or "exclude" has a field or value that the judge would not see."""
    if not isinstance(item, dict):
        raise ValueError(f'an entry of "{key}" must be an object, it is {item!r}')
    unknown = set(item) - {"class", "count", "color", "region", "size"}
    if unknown:
        raise ValueError(f'an entry of "{key}" has the unknown field {sorted(unknown)[0]!r}')
    text_field(item, "class")
    count = item.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f'"count" must be a whole number from 1 on, it is {count!r}')
    if "region" in item:
        known_field(item, "region", REGIONS)
    if "size" in item:
        known_field(item, "size", SIZES)


def checklist(facts: dict[str, Any]) -> list[str]:
    """Returns the expectations in words, one per entry; "exclude n" becomes "no more than n - 1".

    The text is part of the question to the judge: changing it changes the keys of kept answers.
    """
    lines = []
    for item in facts["include"]:
        line = f"{item['class']}: exactly {item['count']}"
        if "color" in item:
            line += f", colour {item['color']}"
        if "region" in item:
            line += f", in the {REGIONS[item['region']]} of the picture"
        if "size" in item:
            line += f", {SIZES[item['size']]}"
        lines.append(line)
    return lines + [f"{item['class']}: no more than {item['count'] - 1}" for item in facts["exclude"]]
