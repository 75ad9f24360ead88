"""How the judge of a synthesis recipe is asked about an image: with GenEval++'s checklist, or with a note in words."""

from collections.abc import Sequence
from typing import Any

from echo4o.dataset_scripts.synthesis.calls import ImageCheck, ImageCheckResult
from echo4o.dataset_scripts.synthesis.recipe import JudgeSettings
from echo4o.endpoints.chat_endpoint import ImageFile
from echo4o.endpoints.endpoint import ModelAnswer
from echo4o.endpoints.json_answers import read_json_answer
from echo4o.evaluation.benchmarks.base import PROMPTS
from echo4o.evaluation.benchmarks.genevalpp import Correct, checklist
from echo4o.evaluation.judge_prompts import JudgePrompt
from echo4o.evaluation.judges import Question, make_judge
from echo4o.evaluation.judges.hosted import OpenAIJudge


class JudgeImageChecker:
    """The judge of a recipe with its two judge prompts.

    A check with a structure (`include`) is asked with GenEval++'s checklist, any other with the check's note.
    """

    def __init__(self, config: JudgeSettings):
        if config.is_local:
            self.endpoint = make_judge(config.name)
        else:
            self.endpoint = OpenAIJudge(
                config.name.removeprefix("openai:"),
                config.url,
                config.key_variable,
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                timeout=config.timeout,
            )
        self._checklist_prompt = JudgePrompt.read(PROMPTS / "genevalpp.md")
        self._note_prompt = JudgePrompt.read(PROMPTS / "synthesis_note.md")

    def _prompt(self, check: ImageCheck) -> JudgePrompt:
        return self._checklist_prompt if check.include else self._note_prompt

    def question(
        self, check: ImageCheck, image: ImageFile, references: Sequence[ImageFile]
    ) -> tuple[Question, dict[str, Any]]:
        """The question to the judge, and the facts that it rests on."""
        if check.include:
            facts = {"include": list(check.include), "exclude": []}
            values = {"instruction": check.instruction, "checklist": checklist(facts), "tag": ""}
        else:
            facts = {"note": check.note}
            values = {"instruction": check.instruction, **facts}
        return self._prompt(check).question(values, Correct, image, references, facts), facts

    def read(self, check: ImageCheck, answer: ModelAnswer) -> ImageCheckResult:
        """The verdict in an answer. Raises [`UnreadableAnswer`]."""
        verdict = read_json_answer(answer, Correct)
        return ImageCheckResult(bool(verdict.correct), verdict.reason, self._prompt(check).sha256)
