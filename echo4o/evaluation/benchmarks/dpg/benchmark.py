"""DPG-Bench as two benchmarks: one call per question, or all questions of an image in one call."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, create_model

from echo4o.evaluation.benchmarks.base import Aspect, BareVerdict, Benchmark, BenchmarkPrompt, Measure
from echo4o.evaluation.benchmarks.dpg.prompts import GROUP, questions_of
from echo4o.evaluation.benchmarks.dpg.scoring import CategoryScore, category_scores, image_score
from echo4o.evaluation.metrics.dpg import formula

# The judge of the original, whose answers can be read from the file that it writes.
ORIGINAL_JUDGE = "mplug"
_ANSWER_TOKENS = 12  # of {"answer": "yes"}; per question also where all are asked at once


def _plain(value: Any) -> Any:
    """Judges write "Yes", "yes." or true."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value.strip().rstrip(".").lower() if isinstance(value, str) else value


YesOrNo = Annotated[Literal["yes", "no"], BeforeValidator(_plain)]


class _Answers(BareVerdict):
    """The answers to some questions; each field is one."""

    def scores(self) -> dict[str, float]:
        return {name: float(value == "yes") for name, value in self.model_dump().items()}


@lru_cache(maxsize=4096)
def _answers_to(names: tuple[str, ...]) -> type[_Answers]:
    fields: Any = {name: (YesOrNo, ...) for name in names}
    return create_model("Answers", __base__=_Answers, **fields)


class DPGBench(Benchmark):
    name = "dpg"
    title = "DPG-Bench"
    groups = (GROUP,)
    aspects = (Aspect("answer", "dpg_question.md", _answers_to(("answer",))),)
    scale = formula.SCALE
    images_per_prompt = 4
    one_call = False

    def read_row(self, row: dict, number: int, folder: Path) -> BenchmarkPrompt:
        raise NotImplementedError("prompts of DPG-Bench come with a question table; see prompts.load_dpg")

    def aspects_of(self, prompt: BenchmarkPrompt) -> Sequence[Aspect]:
        verdict = _answers_to(("answer",))
        return [
            Aspect(_name(row["id"]), "dpg_question.md", verdict, asked_with="answer", answer_tokens=_ANSWER_TOKENS)
            for row in prompt.facts["questions"]
        ]

    def question(self, prompt: BenchmarkPrompt) -> dict[str, Any]:
        return {"instruction": prompt.text}

    def question_about(self, prompt: BenchmarkPrompt, aspect: Aspect) -> dict[str, Any]:
        texts = {_name(row["id"]): row["text"] for row in prompt.facts["questions"]}
        return self.question(prompt) | {"question": texts[aspect.name]}

    def answers(self, records: Sequence[dict[str, Any]]) -> dict[int, bool]:
        """By question, whether an image's records answer it with yes."""
        return {int(record["aspect"][1:]): record["scores"]["answer"] == 1.0 for record in records}

    def image_score(self, prompt: BenchmarkPrompt, records: Sequence[dict[str, Any]]) -> float:
        return self.scale * image_score(questions_of(prompt), self.answers(records))

    def sample_score(self, scores: dict[str, float]) -> float:
        raise NotImplementedError("an image's score depends on the questions of its prompt; see image_score")

    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        return formula.aggregates(counts)

    def details(self, images: Sequence[tuple[BenchmarkPrompt, Sequence[dict[str, Any]]]]) -> dict[str, Any]:
        """Categories over all images, in percent: after the dependency rule, and without it (`raw`)."""
        broad, detailed = category_scores((questions_of(prompt), self.answers(records)) for prompt, records in images)
        return {"categories": {"broad": _percent(broad), "detailed": _percent(detailed)}}

    def judged_values(
        self, prompt: BenchmarkPrompt, records: Sequence[dict[str, Any]]
    ) -> dict[tuple[str, str], float]:
        return {("answer", _name(number)): float(yes) for number, yes in self.answers(records).items()}

    def explanation(self, prompt: BenchmarkPrompt, record: dict[str, Any]) -> str:
        if record["scores"] is None:
            return record["reason"]
        texts = {row["id"]: row["text"] for row in prompt.facts["questions"]}
        answers = self.answers([record])
        return "; ".join(f"{'yes' if yes else 'no'}: {texts[number]}" for number, yes in answers.items())

    def measure(self, prompts: dict[str, Any], judge: dict[str, Any]) -> Measure:
        why_not = []
        if judge["judge"] != ORIGINAL_JUDGE:
            why_not.append(f"the judge is {judge['judge']}, not the original's model: this is another measure")
        if not prompts.get("official_questions"):
            why_not.append("the question table is not the official one")
        elif not prompts.get("official"):
            why_not.append("the prompts are not the official ones")
        return Measure(self.title, None if why_not else "dpg", "; ".join(why_not) or None)


class DPGOneCall(DPGBench):
    """All questions of an image in one call: a thirteenth of the calls, and a measure of its own."""

    name = "dpg_one_call"
    title = "DPG-Bench, all questions of an image in one call"
    aspects = (Aspect("answers", "dpg_all_questions.md", _answers_to(("q1",))),)
    one_call = True
    reports_fields = False

    def aspects_of(self, prompt: BenchmarkPrompt) -> Sequence[Aspect]:
        names = tuple(_name(row["id"]) for row in prompt.facts["questions"])
        tokens = _ANSWER_TOKENS * len(names)
        return [Aspect("answers", "dpg_all_questions.md", _answers_to(names), answer_tokens=tokens)]

    def question_about(self, prompt: BenchmarkPrompt, aspect: Aspect) -> dict[str, Any]:
        lines = [f"{_name(row['id'])}: {row['text']}" for row in prompt.facts["questions"]]
        return self.question(prompt) | {"questions": lines}

    def answers(self, records: Sequence[dict[str, Any]]) -> dict[int, bool]:
        return {int(name[1:]): value == 1.0 for record in records for name, value in record["scores"].items()}


def _name(number: int) -> str:
    """The name of a question as an aspect or a field."""
    return f"q{number}"


def _percent(scores: dict[str, CategoryScore]) -> dict[str, dict[str, float]]:
    return {
        name: asdict(score) | {"score": 100 * score.score, "raw": 100 * score.raw} for name, score in scores.items()
    }
