"""Reading a verdict from what a judge wrote: tolerant about the wrapping, strict about the content."""

import json

from pydantic import ValidationError

from echo4o.evaluation.benchmarks.base import Verdict
from echo4o.evaluation.judges.base import Answer

_MOST_TRIES = 200  # braces that begin no object; a degenerate answer can consist of them


class Unreadable(ValueError):
    """An answer without a verdict; `kind` names why."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def read_verdict(answer: Answer, verdict: type[Verdict]) -> Verdict:
    """The verdict in an answer: bare JSON, JSON in a code fence, or one object within prose."""
    if answer.refusal:
        raise Unreadable("refusal", f"the judge refused: {_short(answer.refusal)}")
    if not answer.text.strip():
        raise Unreadable("empty", "the answer is empty")
    if answer.cut:
        raise Unreadable("cut_off", f"the answer stopped at the length limit: {_short(answer.text)}")
    objects = _objects(answer.text)
    if not objects:
        raise Unreadable("no_json", f"there is no JSON object in the answer: {_short(answer.text)}")
    verdicts, complaint = [], ""
    for found in objects:
        try:
            verdicts.append(verdict.model_validate(found))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the object"
            complaint = f"{field}: {first['msg']} (it is {_short(json.dumps(first['input']), 60)})"
    if not verdicts:
        raise Unreadable("wrong_fields", complaint)
    if any(other.scores() != verdicts[0].scores() for other in verdicts[1:]):
        raise Unreadable("ambiguous", "the answer holds several verdicts that differ")
    return verdicts[0]


def _objects(text: str) -> list[dict]:
    """The JSON objects that stand in a text, outermost ones only."""
    decoder, found, at, failed = json.JSONDecoder(), [], text.find("{"), 0
    while at >= 0 and failed < _MOST_TRIES:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end, failed = at + 1, failed + 1
        else:
            if isinstance(value, dict):
                found.append(value)
        at = text.find("{", end)
    return found


def _short(text: str, length: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."
