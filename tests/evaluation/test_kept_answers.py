"""Only what was accepted is kept, and what was paid for is used and counted even where nothing can be written."""

import asyncio
import json
import warnings

import pytest

import echo4o.testing.openai_server
from echo4o.common import files
from echo4o.common.json_lines import JsonLines
from echo4o.endpoints.budget import Ledger
from echo4o.endpoints.cache import AnswerCache
from echo4o.endpoints.calls import Caller
from echo4o.endpoints.endpoint import Endpoint, ModelAnswer
from echo4o.endpoints.limits import CallPolicy, ConcurrencyLimit, StopSignal
from echo4o.evaluation.score import score_folder
from echo4o.testing.openai_server import EndpointFault
from tests.evaluation.test_faults import judge, third


def with_content(monkeypatch, content, finish="stop", times=1):
    """The next answers of the server have this content."""
    real, left = echo4o.testing.openai_server.chat_response, [times]

    def odd(*arguments, **options):
        value = real(*arguments, **options)
        if left[0]:
            left[0] -= 1
            choice = value["choices"][0]
            choice["message"]["content"] = content(choice["message"]["content"]) if callable(content) else content
            choice["finish_reason"] = finish
        return value

    monkeypatch.setattr(echo4o.testing.openai_server, "chat_response", odd)


def test_a_judge_that_is_given_vision_is_asked_again(server, prompts, pictures, tmp_path):
    server.vision = False
    with pytest.raises(ValueError, match="does not seem to see"):
        judge(server, prompts, pictures, tmp_path / "out", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.json"))
    server.vision = True
    judge(server, prompts, pictures, tmp_path / "out", cache=tmp_path / "cache")
    assert score_folder(tmp_path / "out")["score"] == 0.5
    assert sum(call.is_probe for call in server.calls) == 2
    lines = list(JsonLines(tmp_path / "out" / "spending.jsonl"))
    assert len(lines) == 10, "the probe was paid for twice, with one key"
    judge(server, prompts, pictures, tmp_path / "again", cache=tmp_path / "cache")
    assert len(server.calls) == 10, "accepted answers are kept"


PROBES = {
    "null at the length limit": (None, "length", r"cut_off\); give it more room with --max-tokens"),
    "cut": ('{"reason": "the left half is bl', "length", r"stopped at the length limit.*--max-tokens"),
    "cut, as Anthropic says it": ('{"reas', "max_tokens", r"cut_off"),
    "empty": ("", "stop", r"the answer is empty \(empty\)"),
    "reasoning only, as a list": ([{"type": "thinking", "thinking": "hm"}], "stop", r"the answer is empty"),
    "prose": ("blue and yellow", "stop", r"no JSON object"),
    "filtered": (None, "content_filter", r"refused"),
}


@pytest.mark.parametrize("name", PROBES)
def test_the_probe_says_why_its_answer_is_of_no_use_and_does_not_keep_it(
    name, server, prompts, pictures, tmp_path, monkeypatch
):
    content, finish, message = PROBES[name]
    with_content(monkeypatch, content, finish)
    with pytest.raises(ValueError, match=message) as stopped:
        judge(server, prompts, pictures, tmp_path / "out", cache=tmp_path / "cache")
    assert "does not seem to see" not in str(stopped.value)
    judge(server, prompts, pictures, tmp_path / "out", cache=tmp_path / "cache")
    assert score_folder(tmp_path / "out")["score"] == 0.5


@pytest.mark.parametrize("kind", ["empty", "half", "cut", "refusal", "filtered", "wrong_fields"])
def test_answers_that_cannot_be_read_are_not_kept(kind, server, prompts, pictures, tmp_path):
    server.inject(EndpointFault(kind, times=2, match="number 3"))
    judge(server, prompts, pictures, tmp_path / "a", cache=tmp_path / "cache")
    assert third(tmp_path / "a")["status"] == "judge_error"
    asked = len(server.calls)
    judge(server, prompts, pictures, tmp_path / "b", cache=tmp_path / "cache")
    assert third(tmp_path / "b")["status"] == "scored" and len(server.calls) == asked + 1


def test_content_as_a_list_is_read(server, prompts, pictures, tmp_path, monkeypatch):
    with_content(
        monkeypatch, lambda text: [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}], times=9
    )
    judge(server, prompts, pictures, tmp_path / "out", cache=tmp_path / "cache")
    assert score_folder(tmp_path / "out")["score"] == 0.5
    for file in (tmp_path / "cache").rglob("*.json"):
        assert isinstance(json.loads(file.read_text())["answer"]["text"], str)


def test_answers_that_an_earlier_version_kept_are_judged_again(tmp_path):
    cache = AnswerCache(tmp_path)
    files.write_json(tmp_path / "ab" / "ab.json", {"answer": {"text": [{"type": "text"}]}, "run": "x"})
    assert cache.get("ab") is None


class Echo(Endpoint):
    name, paid = "echo", True

    def __init__(self):
        self.asked = 0

    def identity(self):
        return {}

    async def ask(self, request, key):
        self.asked += 1
        return ModelAnswer("yes", input_tokens=1000)


def ask_twice(ledger, cache):
    async def main():
        stop = StopSignal()
        limit = ConcurrencyLimit(1, stop)
        with ledger:
            caller = Caller(Echo(), CallPolicy(), limit, stop, ledger.account("", "echo", limit), cache, "run")
            return [await caller.ask("q", key, []) for key in ("k1", "k2")]

    return asyncio.run(main())


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_cache_that_cannot_be_written_is_reported_once(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the way")
    ledger = Ledger(tmp_path / "a.jsonl", token_price=(10.0, 10.0))
    with pytest.warns(UserWarning, match="answers cannot be kept") as told:
        answers = ask_twice(ledger, AnswerCache(tmp_path / "cache"))
    assert [answer.text for answer in answers] == ["yes", "yes"] and len(told) == 1
    assert ledger.calls == len(list(JsonLines(tmp_path / "a.jsonl"))) == 2


def test_costs_that_cannot_be_written_are_counted_and_told_once(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "a.jsonl", token_price=(10.0, 10.0))
    monkeypatch.setattr(files, "write", full)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        answers = ask_twice(ledger, None)
    assert [answer.text for answer in answers] == ["yes", "yes"]
    assert [str(each.message).partition(": ")[2][:26] for each in told] == ["costs cannot be written ([" + ""]
    assert ledger.calls == 2 and ledger.spent == pytest.approx(0.02)


def test_a_content_filter_in_front_of_the_judge_is_a_refusal(server, prompts, pictures, tmp_path):
    server.inject(EndpointFault("http_400", times=9, match="number 3", message="No.", code="content_filter"))
    judge(server, prompts, pictures, tmp_path / "out")
    assert {fault["kind"] for fault in third(tmp_path / "out")["faults"]} == {"refusal"}
