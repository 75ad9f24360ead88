"""Planned rows, their instructions, and the steps that write them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from echo4o.common.model_text import json_objects
from echo4o.dataset_scripts.synthesis.calls import ModelCalls, UnusableAnswer

Value = TypeVar("Value")


@dataclass(frozen=True)
class PlannedRow:
    """A planned row; `sketch` holds everything that was sampled for it."""

    part: str
    number: int
    seed: int
    sketch: dict[str, Any]
    repeats: bool = False  # an earlier row has the same sketch, because the vocabulary is too small

    @property
    def id(self) -> str:
        """Name of the row, for example "surreal_fantasy-000012"."""
        return f"{self.part}-{self.number:06d}"


@dataclass(frozen=True)
class Instruction:
    """An instruction with what its image must show: `include` in the form of GenEval++, or `note` in words."""

    text: str
    category: str
    include: tuple[dict, ...] = ()
    note: str = ""
    references: tuple[bytes, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # stored in the metadata of the row
    remarks: tuple[str, ...] = ()  # counted at the end


class RowSteps:
    """The steps of one row: calls the text model, parses its answers, and records every result."""

    def __init__(self, task: PlannedRow, calls: ModelCalls, keep: Callable[[dict], None], answers: int):
        self.task, self.calls, self._keep, self.answers = task, calls, keep, answers
        self.prompts: dict[str, str] = {}  # step -> hash of its prompt

    def keep(self, step: str, attempt: int = 1, **result: Any) -> None:
        """Records the result of a step."""
        self._keep({"row": self.task.id, "step": step, "attempt": attempt, **result})

    async def write(self, step: str, prompt: str, read: Callable[[str], Value], shared: bool = False) -> Value:
        """Returns the first usable answer.

        Args:
            step: name of the step.
            read: parses an answer; raises UnusableAnswer.
            shared: rows with the same prompt share one answer.

        Raises:
            UnusableAnswer: none of `answers` answers is usable.
        """
        digest = self.prompts[step] = hashlib.sha256(prompt.encode()).hexdigest()
        model, last = self.calls.names.get("text", ""), ""
        for attempt in range(1, self.answers + 1):
            salt = str(attempt) if shared else f"{self.task.id} {attempt}"
            about = {"model": model, "prompt_sha256": digest}
            try:
                answer = await self.calls.write(prompt, salt)
                value = read(answer)
            except UnusableAnswer as error:
                last = str(error)
                self.keep(step, attempt, **about, unusable=last)
                continue
            self.keep(step, attempt, **about, result=value)
            return value
        raise UnusableAnswer(f"{step}: {last}")


def one_line(answer: str, most_words: int = 80) -> str:
    """Returns the answer as one line. Raises [`UnusableAnswer`] if it is empty or too long."""
    text = " ".join(answer.split()).strip("\"'“”` ")
    if not text:
        raise UnusableAnswer("the answer is empty")
    if len(text) > 1000:
        raise UnusableAnswer(f"the answer has {len(text):,} characters; at most 1,000 are allowed")
    if len(text.split()) > most_words:
        raise UnusableAnswer(f"the answer has {len(text.split())} words; at most {most_words} are allowed")
    return text


def json_object(answer: str, keys: tuple[str, ...]) -> dict[str, str]:
    """Returns the JSON object in an answer, which must have a text for each key. Raises [`UnusableAnswer`]."""
    objects = [each.value for each in json_objects(answer)]
    if not objects:
        raise UnusableAnswer("the answer does not contain a JSON object")
    value = next((each for each in reversed(objects) if keys[0] in each), objects[-1])
    missing = [key for key in keys if not isinstance(value.get(key), str) or not value[key].strip()]
    if missing:
        raise UnusableAnswer(f"the answer has no text under {missing[0]!r}")
    return {key: value[key].strip()[:200] for key in keys}


def article(words: str) -> str:
    """Returns the words with "a" or "an"."""
    return ("an " if words[:1].lower() in "aeiou" else "a ") + words


def listed(things: list[str]) -> str:
    """Joins words as "a, b and c"."""
    return f"{', '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]
