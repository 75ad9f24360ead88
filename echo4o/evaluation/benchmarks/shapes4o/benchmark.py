"""The benchmark of the quickstart: held-out prompts of Shapes-4o, scored like GenEval++ by reading the pixels."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from echo4o.evaluation.benchmarks.base import Aspect, Benchmark, BenchmarkPrompt, text_field
from echo4o.evaluation.benchmarks.genevalpp import Correct
from echo4o.evaluation.metrics.genevalpp import formula


def rows_of(prompts: Iterable) -> list[dict[str, Any]]:
    """Returns the rows of a prompt file for prompts of Shapes-4o; ids are their numbers from 1."""
    return [
        {"tag": prompt.tag, "prompt": prompt.text, "include": [_item(group) for group in prompt.groups]}
        for prompt in prompts
    ]


def _item(group) -> dict[str, Any]:
    stated = {"color": group.colour, "region": group.region, "size": group.size}
    return {"class": group.shape, "count": group.count} | {k: v for k, v in stated.items() if v is not None}


class Shapes4o(Benchmark):
    name = "shapes4o"
    title = "Shapes-4o"
    groups = ()  # the tags of the prompts
    aspects = (Aspect("correct", "genevalpp.md", Correct),)
    scale = 1.0
    only_judge = "pixels"

    def read_row(self, row: dict, number: int, folder: Path) -> BenchmarkPrompt:
        tag, text = text_field(row, "tag"), text_field(row, "prompt")
        if not isinstance(row.get("include"), list) or not row["include"]:
            raise ValueError('"include" is missing: it lists what the image must show')
        return BenchmarkPrompt(str(row.get("id", number)), tag, text, tag, {"include": row["include"]})

    def question(self, prompt: BenchmarkPrompt) -> dict[str, Any]:
        lines = [", ".join(f"{name}: {value}" for name, value in item.items()) for item in prompt.facts["include"]]
        return {"instruction": prompt.text, "checklist": lines, "tag": prompt.group}

    def sample_score(self, scores: dict[str, float]) -> float:
        return formula.sample_score(scores["correct"])

    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        return formula.aggregates(counts)
