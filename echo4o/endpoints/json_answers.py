"""Structured answers: the JSON schema to request, and the object in what a model wrote.

Reading is tolerant about what surrounds the JSON and strict about its content.
"""

import json
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from echo4o.endpoints.endpoint import Answer

_MOST_TRIES = 200  # braces that do not begin an object; a degenerate answer can consist of them
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
        if get_origin(info.annotation) is Literal:
            properties[name] = {"type": "integer", "enum": list(get_args(info.annotation))}
        else:
            properties[name] = {"type": "string" if info.annotation is str else "number"}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_json_answer(answer: Answer, fields: type[Fields]) -> Fields:
    """The object in an answer: bare JSON, JSON in a code fence, or one object within prose.

    Raises:
        UnreadableAnswer: there is none, or there are several that differ in more than their `reason`.
    """
    if answer.refusal:
        raise UnreadableAnswer("refusal", f"the judge refused: {_short(answer.refusal)}")
    if not answer.text.strip():
        raise UnreadableAnswer("empty", "the answer is empty")
    if answer.cut:
        raise UnreadableAnswer("cut_off", f"the answer stopped at the length limit: {_short(answer.text)}")
    objects = _objects(answer.text)
    if not objects:
        raise UnreadableAnswer("no_json", f"the answer holds no JSON object: {_short(answer.text)}")
    values, complaint = [], ""
    for found in objects:
        try:
            values.append(fields.model_validate(found))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the object"
            complaint = f"{field}: {first['msg']} (it is {_short(json.dumps(first['input']), 60)})"
    if not values:
        raise UnreadableAnswer("wrong_fields", complaint)
    if any(_without_reason(other) != _without_reason(values[0]) for other in values[1:]):
        raise UnreadableAnswer("ambiguous", "the answer holds several verdicts that differ")
    return values[0]


def _without_reason(value: BaseModel) -> dict[str, Any]:
    return value.model_dump(exclude={"reason"})


def _objects(text: str) -> list[dict]:
    """The JSON objects in a text, outermost ones only."""
    decoder, found, position, failed = json.JSONDecoder(), [], text.find("{"), 0
    while position >= 0 and failed < _MOST_TRIES:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end, failed = position + 1, failed + 1
        else:
            if isinstance(value, dict):
                found.append(value)
        position = text.find("{", end)
    return found


def _short(text: str, length: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
