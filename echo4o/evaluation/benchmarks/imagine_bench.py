"""Imagine-Bench (arXiv 2508.09987): 270 prompts for fantasies, 8 types in 4 groups, three grades per image."""

from pathlib import Path
from typing import Any

from echo4o.evaluation.benchmarks.base import (
    Aspect,
    Benchmark,
    BenchmarkPrompt,
    Grade,
    PromptSource,
    Verdict,
    known_field,
    text_field,
)
from echo4o.evaluation.metrics.imagine_bench import formula


class Grades(Verdict):
    fantasy_fulfillment: Grade
    identity_preservation: Grade
    aesthetic_quality: Grade


class ImagineBench(Benchmark):
    name = "imagine_bench"
    title = "Imagine-Bench"
    groups = tuple(formula.WEIGHTS)
    aspects = (Aspect("grades", "imagine_bench.md", Grades),)
    scale = 10.0
    # Revision and path: as for GenEval++, in the same repository. The checksum is that of the copy which the tests
    # read; it equals the repository's stored text in length and end, no published checksum is known.
    source = PromptSource(
        url="https://raw.githubusercontent.com/yejy53/Echo-4o/{revision}/test_scripts/Imagine.jsonl",
        revision="28f36d76558e5f53b9deceda78bf025ef0d0ea24",
        sha256="e22e33dd5e2722b9fedfb7ecddeb56841ec6ea93b3f0246a04d8dd374ab5a19e",
        count=270,
    )

    def read_row(self, row: dict, number: int, folder: Path) -> BenchmarkPrompt:
        kind = known_field(row, "type", formula.GROUP_OF)
        text, note = text_field(row, "instruction"), text_field(row, "note")
        return BenchmarkPrompt(str(row.get("id", number)), formula.GROUP_OF[kind], text, kind, {"note": note})

    def question(self, prompt: BenchmarkPrompt) -> dict[str, Any]:
        return {"instruction": prompt.text, "note": prompt.facts["note"], "type": prompt.type}

    def sample_score(self, scores: dict[str, float]) -> float:
        return formula.sample_score(**scores)

    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        return formula.aggregates(counts)
