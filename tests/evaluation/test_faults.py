"""Whatever a judge's endpoint does, the record says what happened, and the score rests on what was judged."""

import json

import pytest

from echo4o.common.json_lines import JsonLines
from echo4o.endpoints.limits import CallPolicy
from echo4o.endpoints.openai_connection import duration, wait_of
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.prompt_files import load_prompts
from echo4o.evaluation.judges.hosted import OpenAIJudge
from echo4o.evaluation.judging import JudgingOptions
from echo4o.evaluation.run import judge_folder, keep_prompts
from echo4o.evaluation.score import score_folder
from echo4o.testing.openai_server import API_KEY, EndpointFault

FAST = CallPolicy(concurrency=4, tries=3, answers=2, first_wait=0.01, longest_wait=0.05)
# The question about picture 3 (of an odd number: incorrect) meets the fault.
THIRD = "number 3"


def judge(server, prompts, pictures, out, policy=FAST, timeout=5.0, url=None, model="judge", **options):
    benchmark = get_benchmark("genevalpp")
    of_file = load_prompts(benchmark, prompts)
    keep_prompts(benchmark, of_file, out)
    endpoint = OpenAIJudge(model, url=url or server.url, timeout=timeout)
    return judge_folder(
        benchmark, of_file.prompts, endpoint, out, pictures, options=JudgingOptions(policy=policy, **options)
    )


def third(out) -> dict:
    (record,) = [record for record in JsonLines(out / "records.jsonl") if record["id"] == "3"]
    return record


# fault, what the record calls it, tries until there is a verdict
OVERCOME = {
    "429 with Retry-After": (EndpointFault("http_429", retry_after=0.05), "http_429", 2),
    "429 with a date": (EndpointFault("http_429", retry_after="Mon, 01 Jan 2024 00:00:00 GMT"), "http_429", 2),
    "429 with rate limit headers": (
        EndpointFault(
            "http_429", headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "60ms"}
        ),
        "http_429",
        2,
    ),
    "500": (EndpointFault("http_500", times=2), "http_500", 3),
    "503": (EndpointFault("http_503", retry_after=0.02), "http_503", 2),
    "nothing": (EndpointFault("nothing"), "connection", 2),
    "no answer in time": (EndpointFault("late", delay=1.6), "timeout", 2),
    "empty": (EndpointFault("empty"), "empty", 2),
    "half a JSON": (EndpointFault("half"), "no_json", 2),
    "refusal": (EndpointFault("refusal"), "refusal", 2),
    "content filter": (EndpointFault("filtered"), "refusal", 2),
    "cut off": (EndpointFault("cut"), "cut_off", 2),
    "wrong fields": (EndpointFault("wrong_fields"), "wrong_fields", 2),
    "out of range": (EndpointFault("out_of_range"), "wrong_fields", 2),
    "two verdicts": (EndpointFault("two_verdicts"), "wrong_fields", 1),
    "no choices": (EndpointFault("no_choices"), "bad_response", 2),
    "no JSON at all": (EndpointFault("not_json"), "bad_response", 2),
    "late": (EndpointFault("late", delay=0.2), None, 1),
    "in a code fence": (EndpointFault("fence"), None, 1),
    "within prose": (EndpointFault("prose"), None, 1),
}


@pytest.mark.long
@pytest.mark.parametrize("name", OVERCOME)
def test_a_passing_fault_is_noted_and_overcome(name, server, prompts, pictures, tmp_path):
    fault, kind, tries = OVERCOME[name]
    fault = EndpointFault(**(vars(fault) | {"match": THIRD, "headers": dict(fault.headers)}))
    server.inject(fault)
    # Picture 3 is wrong; "two verdicts" says wrong twice, which is one verdict.
    judge(server, prompts, pictures, tmp_path / "out", timeout=1.2 if name == "no answer in time" else 5.0)
    record = third(tmp_path / "out")
    assert (record["status"], record["scores"]) == ("scored", {"correct": 0})
    assert record["attempts"] == tries
    if tries > 1:
        assert {fault["kind"] for fault in record["faults"]} == {kind}
    else:
        assert record["faults"] == []
    result = score_folder(tmp_path / "out")
    assert (result["score"], result["coverage"]) == (0.5, 1.0)
    assert result["groups"]["color_attr"] == {"score": 1.0, "scored": 4, "total": 4}
    assert result["groups"]["counting"] == {"score": 0.0, "scored": 4, "total": 4}


LASTING = {
    "500": ("http_500", "http_500", 3),
    "nothing": ("nothing", "connection", 3),
    "429": ("http_429", "http_429", 3),
    "400": ("http_400", "http_400", 1),
    "empty": ("empty", "empty", 2),
    "half a JSON": ("half", "no_json", 2),
    "refusal": ("refusal", "refusal", 2),
    "wrong fields": ("wrong_fields", "wrong_fields", 2),
    "out of range": ("out_of_range", "wrong_fields", 2),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_an_error_and_never_a_score(name, server, prompts, pictures, tmp_path):
    kind, noted, tries = LASTING[name]
    out = tmp_path / "out"
    server.inject(EndpointFault(kind, times=99, match=THIRD))
    judge(server, prompts, pictures, out)
    record = third(out)
    assert (record["status"], record["scores"], record["attempts"]) == ("judge_error", None, tries)
    assert {fault["kind"] for fault in record["faults"]} == {noted}
    assert record["reason"] == record["faults"][-1]["message"] != ""
    withheld = score_folder(out)
    assert withheld["score"] is None and "coverage is 0.8750" in withheld["withheld"]
    assert withheld["statuses"] == {"scored": 7, "judge_error": 1, "missing_image": 0, "not_judged": 0}
    assert withheld["groups"]["counting"] == {"score": 0.0, "scored": 3, "total": 4}
    assert score_folder(out, min_coverage=0.8)["score"] == 0.5


def test_verdicts_that_differ_are_no_verdict(server, prompts, pictures, tmp_path):
    # Picture 4 is right, and the second verdict of the answer says it is wrong.
    server.inject(EndpointFault("two_verdicts", times=99, match="number 4"))
    judge(server, prompts, pictures, tmp_path / "out")
    (record,) = [r for r in JsonLines(tmp_path / "out" / "records.jsonl") if r["id"] == "4"]
    assert (record["status"], record["faults"][-1]["kind"]) == ("judge_error", "ambiguous")


def test_transport_errors_are_asked_again_by_the_next_run(server, prompts, pictures, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    server.inject(EndpointFault("http_500", times=3, match=THIRD), EndpointFault("refusal", times=2, match="number 5"))
    judge(server, prompts, pictures, out, cache=cache)
    asked = len(server.judged)
    judge(server, prompts, pictures, out, cache=cache)
    assert len(server.judged) == asked + 1  # only number 3: a refusal is an answer
    assert score_folder(out)["statuses"]["judge_error"] == 1
    # The refusals were paid for and are kept; asking again is asking anew.
    judge(server, prompts, pictures, out, cache=cache, retry_errors=True)
    assert len(server.judged) == asked + 2
    assert score_folder(out)["coverage"] == 1.0


def test_without_structured_outputs(server, prompts, pictures, tmp_path):
    server.inject(EndpointFault("no_schema", times=99, probe=True))
    judge(server, prompts, pictures, tmp_path / "out")
    assert score_folder(tmp_path / "out")["score"] == 0.5
    refused = [call for call in server.calls if "response_format" in call.body]
    assert 1 <= len(refused) <= FAST.concurrency  # found out once, not for every picture


STOPS = {
    "wrong key": (
        EndpointFault("http_401", times=99, message="Incorrect API key provided: {key}", probe=True),
        "http_401",
    ),
    "no such model": (EndpointFault("http_404", times=99, message="no model 'judge'", probe=True), "no model 'judge'"),
    "no money": (EndpointFault("http_429", times=99, code="insufficient_quota", probe=True), "http_429"),
    "too long a wait": (EndpointFault("http_429", times=99, retry_after=9999, probe=True), "http_429"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_no_retry_can_help_stops_at_once(name, server, prompts, pictures, tmp_path):
    fault, message = STOPS[name]
    server.inject(EndpointFault(**vars(fault)))
    with pytest.raises(ValueError, match=message):
        judge(server, prompts, pictures, tmp_path / "out")
    assert len(server.calls) == 1
    assert list(JsonLines(tmp_path / "out" / "records.jsonl")) == []


def test_a_fatal_fault_in_the_middle_keeps_what_was_judged(server, prompts, pictures, tmp_path):
    server.inject(EndpointFault("http_401", times=1, match="number 7"))
    policy = CallPolicy(concurrency=1, tries=1)
    with pytest.raises(ValueError, match="http_401"):
        judge(server, prompts, pictures, tmp_path / "out", policy)
    assert [record["id"] for record in JsonLines(tmp_path / "out" / "records.jsonl")] == ["1", "2", "3", "4", "5", "6"]
    judge(server, prompts, pictures, tmp_path / "out", policy)
    assert score_folder(tmp_path / "out")["coverage"] == 1.0


def test_a_dead_endpoint_stops_the_run(server, prompts, pictures, tmp_path):
    policy = CallPolicy(concurrency=2, tries=2, first_wait=0.01, longest_wait=0.02, give_up_after=3)
    server.inject(EndpointFault("http_502", times=999))
    with pytest.raises(ValueError, match="3 calls in a row failed.*run again to continue"):
        judge(server, prompts, pictures, tmp_path / "out", policy)
    assert len(server.judged) <= 8


def test_a_judge_that_cannot_see(server, prompts, pictures, tmp_path):
    server.vision = False
    with pytest.raises(ValueError, match='does not seem to see images.*"red" and "green"'):
        judge(server, prompts, pictures, tmp_path / "out")
    assert server.judged == []


def test_waits_are_read_as_servers_write_them():
    assert wait_of({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert wait_of({"retry-after": "2"}) == 2.0
    assert wait_of({"retry-after": "Mon, 01 Jan 2024 00:00:00 GMT"}) == 0.0
    assert wait_of({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "1m2s"}) == 62.0
    assert wait_of({"x-ratelimit-remaining-tokens": "5", "x-ratelimit-reset-tokens": "1m2s"}) is None
    assert wait_of({"retry-after": "soon"}) is None
    assert duration("250ms") == 0.25


def test_the_key_is_nowhere(server, prompts, pictures, tmp_path, capfd):
    server.inject(
        EndpointFault("http_500", match=THIRD, message="your header was {key}"),
        EndpointFault("echo_key", match="number 5"),
        EndpointFault("http_400", match="number 6", message="refused: {key}"),
    )
    judge(server, prompts, pictures, tmp_path / "out", cache=tmp_path / "cache")
    score_folder(tmp_path / "out")
    from echo4o.evaluation.score_report import write_report

    write_report(tmp_path / "out")
    printed = capfd.readouterr()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20
    for path in written:
        assert API_KEY.encode() not in path.read_bytes(), path
    assert API_KEY not in printed.out + printed.err
    assert "[key]" in json.dumps(list(JsonLines(tmp_path / "out" / "records.jsonl")))
    assert all(API_KEY not in json.dumps(call.body) for call in server.calls)


def test_keys_in_urls_are_refused_or_dropped(server):
    with pytest.raises(ValueError, match="holds a user and password") as refused:
        OpenAIJudge("judge", url="http://user:hidden@127.0.0.1/v1")
    assert "hidden" not in str(refused.value)
    identity = OpenAIJudge("judge", url="http://127.0.0.1/v1?key=hidden#hidden").identity()
    assert "hidden" not in json.dumps(identity)
