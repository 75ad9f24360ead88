"""The question table of DPG-Bench: read, checked, and grouped by prompt."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from echo4o.evaluation.benchmarks.dpg.scoring import DPGQuestion, category_of

COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")


def read_question_table(path: Path) -> dict[str, tuple[DPGQuestion, ...]]:
    """The questions of each prompt, in the order of rows. Every row counts, the first one as well.

    Rows of one prompt need not stand together. Raises ValueError that names the row: a missing column, an id that is
    not a number, a question twice, an empty dependency, or a parent that the prompt does not have.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the question table must be UTF-8 ({error})") from None
    return parse_question_table(text, str(path))


def parse_question_table(text: str, where: str = "the question table") -> dict[str, tuple[DPGQuestion, ...]]:
    """As [`read_question_table`], from text."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(f"{where}: the column {missing[0]!r} is missing; needed are {', '.join(COLUMNS)}")
    prompts: dict[str, dict[int, DPGQuestion]] = {}
    for number, row in enumerate(reader, start=1):
        try:
            item, question = _read_row(row)
            questions = prompts.setdefault(item, {})
            if question.id in questions:
                raise ValueError(f"question {question.id} of {item} appears twice")
            questions[question.id] = question
        except ValueError as error:
            raise ValueError(f"{where}, row {number}: {error}") from None
    if not prompts:
        raise ValueError(f"{where}: it does not contain a question")
    for item, questions in prompts.items():
        _require_parents(where, item, questions)
    return {item: tuple(questions.values()) for item, questions in prompts.items()}


def _read_row(row: Mapping[str, str | None]) -> tuple[str, DPGQuestion]:
    values = {name: (row[name] or "").strip() for name in COLUMNS}
    for name, value in values.items():
        if not value:
            raise ValueError(f"the column {name!r} is empty")
    parents = tuple(_number("dependency", part) for part in values["dependency"].split(","))
    question = DPGQuestion(
        _number("proposition_id", values["proposition_id"]),
        category_of(values["tuple"]),
        values["question_natural_language"],
        parents,
    )
    return values["item_id"], question


def _number(name: str, text: str) -> int:
    """A whole number; "1.0" is one, because spreadsheets write it."""
    try:
        value = float(text)
        if value != int(value) or value < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is {text.strip()!r}; it must be a whole number from 0") from None
    return int(value)


def _require_parents(where: str, item: str, questions: Mapping[int, DPGQuestion]) -> None:
    for question in questions.values():
        for parent in question.parents:
            if parent != 0 and parent not in questions:
                raise ValueError(
                    f"{where}: question {question.id} of {item} depends on question {parent}, which {item} does not "
                    "have"
                )
