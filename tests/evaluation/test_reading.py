"""Verdicts are read from any wrapping, and never guessed."""

import json

import pytest

from echo4o.endpoints.endpoint import ModelAnswer
from echo4o.endpoints.json_answers import UnreadableAnswer, json_schema, read_json_answer
from echo4o.evaluation.benchmarks.genevalpp import Correct
from echo4o.evaluation.benchmarks.imagine_bench import Grades
from echo4o.evaluation.judge_prompts import answer_format


def read(said, verdict=Correct, **more):
    return read_json_answer(ModelAnswer(said if isinstance(said, str) else json.dumps(said), **more), verdict).scores()


def why(said, verdict=Correct, **more):
    with pytest.raises(UnreadableAnswer) as unreadable:
        read(said, verdict, **more)
    return unreadable.value.kind


@pytest.mark.parametrize("value", [1, 1.0, True, "1"])
def test_ways_to_say_one(value):
    assert read({"reason": "", "correct": value}) == {"correct": 1}


@pytest.mark.parametrize("value", [2, -1, 0.5, "yes", "2", None, [], {}])
def test_what_is_neither_one_nor_zero(value):
    assert why({"reason": "", "correct": value}) == "wrong_fields"


def grades(value):
    return {"reason": "", "fantasy_fulfillment": value, "identity_preservation": 5, "aesthetic_quality": 5}


@pytest.mark.parametrize("value", [0, 10, 7.5, "7"])
def test_grades(value):
    assert read(grades(value), Grades)["fantasy_fulfillment"] == float(value)


@pytest.mark.parametrize("value", [10.01, -0.1, 11, -1, None, "seven", [7]])
def test_values_that_are_not_grades(value):
    assert why(grades(value), Grades) == "wrong_fields"


@pytest.mark.parametrize("word", ["NaN", "Infinity"])
def test_numbers_that_are_none(word):
    assert why(json.dumps(grades(5)).replace("5", word, 1), Grades) == "wrong_fields"


def test_a_missing_field_is_not_made_up():
    said = grades(5)
    del said["aesthetic_quality"]
    assert why(said, Grades) == "wrong_fields"
    assert why({"correct": 1}) == "wrong_fields"  # without a reason


def test_wrappings():
    verdict = '{"reason": "a {brace} and a \\"quote\\"", "correct": 0}'
    for text in (verdict, f"```json\n{verdict}\n```", f"I see {{cups}}. {verdict} That is all.", f"[{verdict}]\n"):
        assert read(text) == {"correct": 0}
    assert read(verdict + verdict) == {"correct": 0}


def test_no_verdict():
    assert why("") == "empty"
    assert why("it is correct") == "no_json"
    assert why('{"reason": "half of it", "corr') == "no_json"
    assert why('{"reason": "x", "correct": 1}', cut=True) == "cut_off"
    assert why("", refusal="no") == "refusal"
    assert why('{"reason": "x", "correct": 1} {"reason": "y", "correct": 0}') == "ambiguous"
    assert why("{" * 100_000) == "no_json"


def test_the_format_is_requested_in_words_and_as_a_schema():
    assert answer_format(Correct).endswith('{"reason": "...", "correct": 0 or 1}')
    schema = json_schema(Grades)
    assert schema["required"] == ["reason", "fantasy_fulfillment", "identity_preservation", "aesthetic_quality"]
    assert schema["additionalProperties"] is False


RIGHT = '{"reason": "as asked", "correct": 1}'
WRONG = '{"reason": "two cups", "correct": 0}'


@pytest.mark.parametrize(
    "text",
    [
        '{"reason": "first line\nsecond\tline", "correct": 1}',
        '\ufeff{"reason": "a byte order mark", "correct": 1}',
        f"<think>It may be {WRONG}, or not.</think>{RIGHT}",
        f"It may be {WRONG}\n</think>\n\n```json\n{RIGHT}\n```",
        f"<THINKING>{{ {WRONG}</THINKING> {RIGHT}",
        f"[THINK]{WRONG}[/THINK]{RIGHT}",
        f"◁think▷{WRONG}◁/think▷{RIGHT}",
        f"<|channel|>analysis<|message|>{WRONG}<|end|><|channel|>final<|message|>{RIGHT}",
        '{"reason": "the sign reads </think> and {x}", "correct": 1}',
        f'{{"step": "count"}}\n{{"cups": 4}}\n{RIGHT}',
        f"Draft: {WRONG}\nI look again; the final verdict:\n{RIGHT}",
        f"{RIGHT}\n{{\"note\": \"done\"}}",
    ],
)  # fmt: skip
def test_the_answer_among_other_text(text):
    assert read(text) == {"correct": 1}


def test_what_is_only_reasoning_or_two_answers_is_not_read():
    assert why(f"<think>I would say {RIGHT}") == "no_json"
    assert why(f"<think>{RIGHT}</think>") == "no_json"
    assert why(f"[{RIGHT}, {WRONG}]") == "ambiguous"
    assert why(f"```json\n{RIGHT}\n```\n```json\n{WRONG}\n```") == "ambiguous"
    assert why("", cut=True) == "cut_off"
    assert why("", Correct, cut=False) == "empty"


def test_text_that_no_file_can_hold_is_marked():
    """JSON can name half of a surrogate pair; records and reports are UTF-8."""
    for text in ('{"reason": "a \\ud800 b", "correct": 1}', '{"reason": "a \ud800 b", "correct": 1}'):
        assert read_json_answer(ModelAnswer(text), Correct).reason == "a \ufffd b"
