"""Text that a language model wrote: what follows its reasoning, and the JSON objects in it."""

import json
import re
from dataclasses import dataclass
from typing import Any

_MOST_TRIES = 200  # braces that do not begin an object; a degenerate answer can consist of them
_NAMES = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning|reflection)"
# Marks around reasoning: <think> of most models, [THINK] of Magistral, the arrows of Kimi, <|...|> of gpt-oss.
_OPENING = re.compile(rf"\s*(?:<{_NAMES}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis)", re.I)
_CLOSING = re.compile(
    rf"</{_NAMES}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final\s*(?:<\|constrain\|>\w+)?<\|message\|>",
    re.I,
)


@dataclass(frozen=True)
class JsonObject:
    """A JSON object and its place in the text."""

    value: dict[str, Any]
    start: int
    end: int


def without_reasoning(text: str) -> str:
    """The text after the reasoning; empty if the text ends within its reasoning."""
    closings = list(_CLOSING.finditer(text))
    if closings:
        return text[closings[-1].end() :]
    return "" if _OPENING.match(text) else text


def json_objects(text: str) -> list[JsonObject]:
    """The outermost JSON objects after the reasoning. Strings may hold line breaks and tabs as they are."""
    found = _objects(text)
    start = 0
    for closing in _CLOSING.finditer(text):
        if not any(each.start < closing.start() < each.end for each in found):  # else it is quoted in a string
            start = closing.end()
    if start == 0 and _OPENING.match(text):
        return []
    return [each for each in found if each.start >= start]


def valid_unicode(text: str) -> str:
    """The text with the mark U+FFFD for halves of surrogate pairs, which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return valid_unicode(value)
    if isinstance(value, list):
        return [_valid(item) for item in value]
    if isinstance(value, dict):
        return {valid_unicode(name): _valid(item) for name, item in value.items()}
    return value


def _objects(text: str) -> list[JsonObject]:
    decoder, found, failed = json.JSONDecoder(strict=False), [], 0
    position = text.find("{")
    while position >= 0 and failed < _MOST_TRIES:
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            end, failed = position + 1, failed + 1
        else:
            found.append(JsonObject(_valid(value), position, end))
        position = text.find("{", end)
    return found
