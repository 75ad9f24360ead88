"""Structured answers: the JSON schema to request, and the object in what a model wrote.

Reading is tolerant about what surrounds the JSON and strict about its content.
"""

import json
import re
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from echo4o.common.model_text import json_objects
from echo4o.endpoints.endpoint import ModelAnswer

_LETTER = re.compile(r"[^\W\d_]")
_FENCE = re.compile(r"```\w*")
Fields = TypeVar("Fields", bound=BaseModel)


class UnreadableAnswer(ValueError):
    """An answer without the object that was asked for.

    Args:
        kind: a short name for the record: "refusal", "empty", "cut_off", "no_json", "wrong_fields" or "ambiguous".
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def json_schema(fields: type[BaseModel]) -> dict[str, Any]:
    """The schema for structured outputs, in the subset that endpoints agree on. Ranges are checked when reading."""
    properties = {}
    for name, info in fields.model_fields.items():
        if info.exclude:
            continue
        if get_origin(info.annotation) is Literal:
            choices = list(get_args(info.annotation))
            kind = "string" if isinstance(choices[0], str) else "integer"
            properties[name] = {"type": kind, "enum": choices}
        else:
            properties[name] = {"type": "string" if info.annotation is str else "number"}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_json_answer(answer: ModelAnswer, fields: type[Fields]) -> Fields:
    """The object in an answer: bare JSON, JSON in a code fence, or an object within prose or after reasoning.

    Where a model corrects itself in words between two objects, the last one is the answer.

    Raises:
        UnreadableAnswer: there is none, or several that differ in more than their `reason` follow each other directly.
    """
    if answer.refusal:
        raise UnreadableAnswer("refusal", f"the judge refused: {_short(answer.refusal)}")
    if answer.cut:
        wrote = _short(answer.text) or "no text, so its length went into reasoning"
        raise UnreadableAnswer("cut_off", f"the answer stopped at the length limit: {wrote}")
    if not answer.text.strip():
        raise UnreadableAnswer("empty", "the answer is empty")
    objects = json_objects(answer.text)
    if not objects:
        raise UnreadableAnswer("no_json", f"the answer holds no JSON object: {_short(answer.text)}")
    values, complaint = [], ""
    for found in objects:
        try:
            values.append((fields.model_validate(found.value), found))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the object"
            complaint = f"{field}: {first['msg']} (it is {_short(json.dumps(first['input']), 60)})"
    if not values:
        raise UnreadableAnswer("wrong_fields", complaint)
    for (one, before), (other, after) in pairwise(values):
        if not _has_words(answer.text[before.end : after.start]) and _without_reason(one) != _without_reason(other):
            raise UnreadableAnswer("ambiguous", "the answer holds several verdicts that differ")
    return values[-1][0]


def is_readable(answer: ModelAnswer, fields: type[BaseModel]) -> bool:
    """Whether [`read_json_answer`] finds the object."""
    try:
        read_json_answer(answer, fields)
    except UnreadableAnswer:
        return False
    return True


def _has_words(between: str) -> bool:
    return _LETTER.search(_FENCE.sub("", between)) is not None


def _without_reason(value: BaseModel) -> dict[str, Any]:
    return value.model_dump(exclude={"reason"})


def _short(text: str, length: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
