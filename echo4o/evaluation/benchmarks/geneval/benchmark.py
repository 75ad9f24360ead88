"""GenEval as a benchmark: its prompt files, its images' layout, and what its scores can be compared with."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo4o.common import strict_json
from echo4o.evaluation.benchmarks.base import (
    Aspect,
    Benchmark,
    BenchmarkPrompt,
    Measure,
    PromptSource,
    known_field,
    text_field,
)
from echo4o.evaluation.benchmarks.geneval.scoring import CLASSES, COLORS, RELATIONS, Thresholds
from echo4o.evaluation.benchmarks.genevalpp import Correct
from echo4o.evaluation.metrics.geneval import formula

_SAMPLE = re.compile(r"\d+\.png")
_FOLDER_DIGITS = 5
_SHOWN = 60  # letters of a prompt in a message


class GenEval(Benchmark):
    name = "geneval"
    title = "GenEval"
    groups = formula.TAGS
    aspects = (Aspect("correct", "geneval.md", Correct),)
    scale = 1.0
    images_per_prompt = 4
    default_judge = "detector"
    prompt_numbers = {"prompts_with_a_right_image": max}
    prompt_files = {
        "original": PromptSource(
            url="https://raw.githubusercontent.com/djghosh13/geneval/{revision}/prompts/evaluation_metadata.jsonl",
            revision="af4902f24d3ca90ebbb446dd9891a59e0f82725f",
            sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
            count=553,
        ),
        # BAGEL's file, which the release of Echo-4o contains as well.
        "rewritten": PromptSource(
            url="https://raw.githubusercontent.com/yejy53/Echo-4o/{revision}/eval/gen/geneval/prompts/"
            "evaluation_metadata_long.jsonl",
            revision="28f36d76558e5f53b9deceda78bf025ef0d0ea24",
            sha256="09472cc9c24e225417b1d5df27e688e5f2a0fcac9ec772f33d9debe4e5d49f27",
            count=553,
        ),
    }
    source = prompt_files["original"]

    def read_row(self, row: dict, number: int, folder: Path) -> BenchmarkPrompt:
        tag, text = known_field(row, "tag", self.groups), text_field(row, "prompt")
        if not row.get("include"):
            raise ValueError('"include" is missing: it lists what the image must show')
        facts = {"tag": tag, "include": row["include"], "exclude": row.get("exclude", [])}
        for key in ("include", "exclude"):
            if not isinstance(facts[key], list):
                raise ValueError(f'"{key}" must be a list, it is {facts[key]!r}')
            for place, clause in enumerate(facts[key]):
                check_clause(clause, key, place)
        return BenchmarkPrompt(str(row.get("id", number)), tag, text, tag, facts)

    def question(self, prompt: BenchmarkPrompt) -> dict[str, Any]:
        return {"instruction": prompt.text, "checklist": checklist(prompt.facts), "tag": prompt.group}

    def sample_score(self, scores: dict[str, float]) -> float:
        return formula.sample_score(scores["correct"])

    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        return formula.aggregates(counts)

    def measure(self, prompts: dict[str, Any], judge: dict[str, Any]) -> Measure:
        prompt_file = prompts.get("prompt_file")
        by_detector = judge["judge"] == "detector"
        why_not = []
        if not by_detector:
            why_not.append(f"the judge is {judge['judge']}, not GenEval's detector: this is another measure")
        else:
            if not judge["published_weights"]:
                why_not.append("the detector's weights are not the published ones")
            if judge["thresholds"] != vars(Thresholds()):
                why_not.append("the thresholds are not the original's")
        if prompt_file is None:
            why_not.append("the prompt file is neither the original nor the rewritten one")
        key = {"original": "geneval", "rewritten": "geneval_rewritten"}.get(prompt_file or "")
        return Measure(
            "GenEval" if by_detector else f"GenEval's prompts, judged by {judge['judge']}",
            published=None if why_not else key,
            why_not="; ".join(why_not) or None,
        )

    def original_images(
        self, folder: Path, prompts: Sequence[BenchmarkPrompt], per_prompt: int
    ) -> dict[tuple[str, int], Path] | None:
        """`00000/samples/0000.png`, ..., where 00000 is the first line of the prompt file, beside `metadata.jsonl`."""
        if not any((path / "samples").is_dir() for path in folder.glob("[0-9]" * _FOLDER_DIGITS)):
            return None
        found = {}
        for prompt in prompts:
            of_prompt = folder / f"{int(prompt.id) - 1:0{_FOLDER_DIGITS}d}"
            _require_same_prompt(of_prompt / "metadata.jsonl", prompt)
            samples = sorted(path for path in (of_prompt / "samples").glob("*.png") if _SAMPLE.fullmatch(path.name))
            if len(samples) > per_prompt:
                raise ValueError(f"{of_prompt}: it has {len(samples)} images; --num-images is {per_prompt}")
            found |= {(prompt.id, number): path for number, path in enumerate(samples, start=1)}
        return found


def _require_same_prompt(file: Path, prompt: BenchmarkPrompt) -> None:
    """Raise ValueError if the file beside the images names another prompt than the prompt file does."""
    if not file.is_file():
        return
    try:
        row = strict_json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: this is not JSON ({error})") from None
    clauses = {"include": row.get("include"), "exclude": row.get("exclude", [])} if isinstance(row, dict) else {}
    if clauses != {key: prompt.facts[key] for key in ("include", "exclude")} or row.get("prompt") != prompt.text:
        raise ValueError(
            f"{file}: the images were made from {str(row)[:_SHOWN]!r}, but prompt {prompt.id} is "
            f"{prompt.text[:_SHOWN]!r}: pass the prompt file of these images with --prompts"
        )


def check_clause(clause: Any, key: str, place: int) -> None:
    """Raise ValueError for a clause that the judges cannot read as it was meant."""
    if not isinstance(clause, dict):
        raise ValueError(f'an entry of "{key}" must be an object, it is {clause!r}')
    unknown = set(clause) - {"class", "count", "color", "position"}
    if unknown:
        raise ValueError(f'an entry of "{key}" has the unknown field {sorted(unknown)[0]!r}')
    known_field(clause, "class", CLASSES)
    count = clause.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f'"count" must be a whole number from 1, it is {count!r}')
    if "color" in clause:
        known_field(clause, "color", COLORS)
    if "position" in clause:
        position = clause["position"]
        if not isinstance(position, list) or len(position) != 2 or position[0] not in RELATIONS:
            raise ValueError(f'"position" must be [relation, number of a clause], it is {position!r}')
        if not isinstance(position[1], int) or not 0 <= position[1] < place:
            raise ValueError(f'"position" names clause {position[1]!r}; it must be an earlier one, from 0')


def checklist(facts: dict[str, Any]) -> list[str]:
    """The expectations in words, for judges that read."""
    most = {clause["class"]: clause["count"] - 1 for clause in facts["exclude"]}
    lines = []
    for clause in facts["include"]:
        name, count = clause["class"], clause["count"]
        exact = most.pop(name, None) == count
        color = f"{clause['color']} " if "color" in clause else ""
        lines.append(f"{'exactly' if exact else 'at least'} {count} {color}{name}")
        if "position" in clause:
            relation, target = clause["position"]
            lines.append(f"the {name} is {relation} the {facts['include'][target]['class']}")
    return lines + [f"no more than {count} {name}" for name, count in most.items()]
