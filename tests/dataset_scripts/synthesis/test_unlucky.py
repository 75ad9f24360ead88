"""Endpoints that answer oddly, models and money that go away on the way, full disks, and words that are used up."""

import base64
import resource
import time

import pytest

import echo4o.testing.openai_server
from echo4o.common.json_lines import JsonLines
from echo4o.testing.openai_server import EndpointFault
from tests.dataset_scripts.synthesis.running import accepted, ends, lines, one_part, run
from tests.dataset_scripts.synthesis.test_resume import command


def answering(monkeypatch, name: str, change) -> None:
    """The server's answers of one kind (`image_response` or `chat_response`), changed before they are sent."""
    real = getattr(echo4o.testing.openai_server, name)

    def odd(*arguments, **options):
        value = real(*arguments, **options)
        change(value)
        return value

    monkeypatch.setattr(echo4o.testing.openai_server, name, odd)


def _first(change):
    return lambda value: value["data"][0].update(b64_json=change(value["data"][0]["b64_json"]))


ODD_PICTURES = {
    "usage of another kind": lambda value: value.update(usage={"prompt_tokens": 5}),
    "usage of null": lambda value: value.update(usage={"input_tokens": None, "output_tokens": None}),
    "no usage": lambda value: value.pop("usage"),
    "two pictures": lambda value: value["data"].append(value["data"][0]),
    "a data URL": _first(lambda text: f"data:image/png;base64,{text}"),
    "base64 in lines": _first(lambda text: base64.encodebytes(base64.b64decode(text)).decode()),
}


@pytest.mark.parametrize("case", ODD_PICTURES)
def test_unusual_answers_that_hold_an_image(server, recipe, tmp_path, monkeypatch, case):
    answering(monkeypatch, "image_response", ODD_PICTURES[case])
    assert "3 accepted, 0 rejected" in run("synthesize", one_part(recipe), "--out", tmp_path / "made")
    assert sum(call.kind == "generate" for call in server.calls) == 3


def test_odd_answers_in_words(server, recipe, tmp_path, monkeypatch):
    answering(monkeypatch, "chat_response", lambda value: value.update(usage={"prompt_tokens": None}))
    write = server.text
    server.text = lambda call: f"{write(call)[:-1]} \ud83d."  # half a surrogate pair
    out = tmp_path / "made"
    assert "3 accepted, 0 rejected" in run("synthesize", one_part(recipe), "--out", out)
    assert all(row["instruction"].endswith(" \ufffd.") for row in accepted(out))


@pytest.mark.parametrize(
    "change",
    [_first(lambda text: "%%%"), _first(lambda text: ""), lambda value: value.update(data=[None])],
    ids=["no base64", "empty", "null"],
)
def test_answers_that_are_not_images_are_paid_for_and_counted(server, recipe, tmp_path, monkeypatch, change):
    """They cost what pictures cost: asked for as often as the gates say, and within the budget."""
    answering(monkeypatch, "image_response", change)
    out = tmp_path / "made"
    said = run("synthesize", one_part(recipe, rows=2), "--out", out, "--budget", 1)
    assert "2 undecodable picture" in said and {row["detail"] for row in lines(out / "rejected.jsonl")} == {
        "truncated: 0 bytes"
    }
    assert sum(call.kind == "generate" for call in server.calls) == 6
    assert sum(server.paid.values()) == len(list(JsonLines(out / "spending.jsonl")))


@pytest.mark.parametrize("kind", ["pictures", "verdicts"])
def test_what_never_works_is_not_paid_for_row_after_row(server, recipe, tmp_path, kind):
    if kind == "pictures":
        changes = {"models__image__size": "128x64"}
    else:
        changes = {}
        server.inject(EndpointFault("wrong_fields", times=999, match="made from this instruction"))
    file = one_part(recipe, rows=40, rate__give_up_after=5, **changes)
    said = " ".join(run("synthesize", file, "--out", tmp_path / "made", code=2).split())
    assert "the last 5 images could not be used; the last reason: " in said and "change the models" in said
    drawn = sum(call.kind == "generate" for call in server.calls)
    assert 5 <= drawn <= 5 + 2 * 4, "no more than were open"
    assert len(ends(tmp_path / "made")) < 5


@pytest.mark.parametrize(
    "fault, message",
    [
        (EndpointFault("http_400", message="The model painter has been deprecated"), "has no model 'painter'"),
        (EndpointFault("http_400", message="Unknown", code="model_not_found"), "has no model 'painter'"),
        (
            EndpointFault("http_403", message="No access to model painter", code="model_not_found"),
            "has no model 'painter'",
        ),
        (EndpointFault("http_400", message="Hard limit", code="billing_hard_limit_reached"), "Hard limit (http_400)"),
        (EndpointFault("http_429", message="Quota", code="insufficient_quota"), "Quota (http_429)"),
    ],
    ids=["deprecated", "code", "no access", "billing", "quota"],
)
def test_models_and_money_that_go_away_on_the_way_reject_no_row(server, recipe, tmp_path, fault, message):
    out, file = tmp_path / "made", one_part(recipe, rows=12)
    run("synthesize", file, "--out", out, "--preview", 2)
    fault.times, fault.call_kind = 999, "generate"
    server.inject(fault)
    assert message in " ".join(run("synthesize", file, "--out", out, code=2).split())
    assert len(accepted(out)) == 2 and not lines(out / "rejected.jsonl")
    fault.times = 0
    assert "12 accepted" in run("synthesize", file, "--out", out)


def test_requests_that_are_not_taken_any_more_stop_the_run(server, recipe, tmp_path):
    out, file = tmp_path / "made", one_part(recipe, rows=30, rate__give_up_after=4)
    run("synthesize", file, "--out", out, "--preview", 2)
    server.inject(EndpointFault("http_400", message="odd", times=999, call_kind="generate"))
    assert "does not accept our request: odd" in run("synthesize", file, "--out", out, code=2)
    assert len(lines(out / "rejected.jsonl")) == 3


def test_a_refusal_of_words_that_only_its_code_tells(server, recipe, tmp_path):
    server.inject(EndpointFault("http_400", message="No.", code="content_filter", call_kind="chat"))
    said = run("synthesize", one_part(recipe), "--out", tmp_path / "made", "--no-probe")
    assert "2 accepted, 1 rejected (1 refused by the text model)" in said


@pytest.mark.timeout(60)
def test_a_call_that_must_wait_a_day_does_not_delay_the_others(server, recipe, tmp_path):
    server.inject(EndpointFault("http_429", retry_after=86_400, call_kind="generate"))
    said = run("synthesize", one_part(recipe, rows=12), "--out", tmp_path / "made", code=1)
    assert "11 accepted" in said and "1 not decided yet" in said


def test_the_budget_holds_when_images_are_dearer_than_anybody_knew(server, recipe, tmp_path, monkeypatch):
    answering(monkeypatch, "image_response", lambda value: value["usage"].update(output_tokens=20_000))
    server.latency, out = 0.05, tmp_path / "made"
    price = {"input": 0.0, "output": 10.0}
    file = one_part(recipe, rows=20, rate__concurrency=8, models__image__price=price)
    run("synthesize", file, "--out", out, "--budget", 0.5, code=2)
    assert 0.2 < sum(line["usd"] for line in JsonLines(out / "spending.jsonl")) <= 0.5


def test_calls_without_a_price_are_not_reported_as_free(server, recipe, tmp_path):
    file = one_part(recipe, models__image__price={})
    said = " ".join(run("synthesize", file, "--plan").split())
    assert "no price in the recipe" in said and "cost: unknown; set models.image.price" in said and "about 0.0" in said
    said = " ".join(run("synthesize", file, "--out", tmp_path / "made").split())
    assert "USD spent in total, not counting the calls of models without a price (models.image.price)" in said


@pytest.mark.long
def test_roles_of_one_model_share_its_rate(server, recipe, tmp_path):
    times, begin = [], server.begin
    server.begin = lambda call: (times.append(time.monotonic()) if call.kind == "chat" else None, begin(call))
    file = one_part(recipe, models__judge__name="writer", rate__per_minute=300)
    run("synthesize", file, "--out", tmp_path / "made", "--no-probe")
    assert len(times) == 6 and max(times) - min(times) >= 4 * 0.2


def test_models_that_take_no_temperature(server, recipe, tmp_path):
    file = one_part(recipe, models__text__temperature=None, models__judge__temperature=None)
    run("synthesize", file, "--out", tmp_path / "made")
    bodies = [call.body for call in server.calls if call.kind == "chat"]
    assert bodies and not any("temperature" in body or "max_tokens" in body for body in bodies)
    assert {body["max_completion_tokens"] for body in bodies} == {600, 1024}


def test_a_preview_with_open_rows_is_not_finished(server, recipe, tmp_path):
    server.inject(EndpointFault("http_500", times=6, call_kind="generate"))
    file = one_part(recipe)
    assert "2 not decided yet" in run("synthesize", file, "--out", tmp_path / "made", "--preview", 2, code=1)
    assert (tmp_path / "made" / "preview.png").is_file()


def test_plurals_of_blocked_words_are_blocked(server, recipe, tmp_path):
    file = one_part(recipe, gates__blocked=["front", "knife|knives"])
    assert "3 blocked content" in run("synthesize", file, "--out", tmp_path / "made")
    write = server.text
    server.text = lambda call: write(call).replace("front", "knives")
    assert "3 blocked content" in run("synthesize", file, "--out", tmp_path / "second")


def test_an_endless_answer_is_not_an_instruction(server, recipe, tmp_path):
    write = server.text
    server.text = lambda call: f"{write(call)[:-1]} {'x' * 2000}"
    strict = one_part(recipe, instruction_following__otherwise="reject")
    out = tmp_path / "made"
    assert "3 no usable instruction" in run("synthesize", strict, "--out", out)
    assert "characters; at most 1,000" in lines(out / "rejected.jsonl")[0]["detail"]


def test_words_that_are_used_up_are_reported_before_they_are_paid_for(server, recipe, tmp_path):
    (tmp_path / "given" / "objects.txt").write_text("cup\nhat\nbus\n")
    few = one_part(recipe, rows=30, instruction_following__tags=["counting"])
    assert "12 of them have the same content as an earlier row" in run("synthesize", few, "--plan")
    assert "earlier row" not in run("synthesize", one_part(recipe, rows=10), "--plan")


def test_a_part_without_rows_can_get_some(server, recipe, tmp_path):
    out = tmp_path / "made"
    run("synthesize", recipe(multi_reference__rows=0), "--out", out, "--preview", 1)
    assert "17 accepted" in run("synthesize", recipe(multi_reference__rows=2), "--out", out)


def test_files_of_the_folder_that_somebody_changed(server, recipe, tmp_path):
    out, file = tmp_path / "made", one_part(recipe)
    run("synthesize", file, "--out", out)
    steps = (out / "steps.jsonl").read_text()
    for strange in ("{rubbish", '{"step": "of another program"}', "7"):
        (out / "steps.jsonl").write_text(f"{strange}\n{steps}")
        assert "steps.jsonl, line 1 is not" in run("synthesize", file, "--out", out, code=2)
    (out / "steps.jsonl").write_text(steps)
    (out / "run.json").write_text("{}")
    assert "run.json does not state the recipe of the rows" in run("synthesize", file, "--out", out, code=2)


def test_lookalikes_of_accepted_images_are_found(server, recipe, tmp_path):
    """From the steps, or from the pictures where the steps are gone; they are no part of the rows."""
    out = tmp_path / "made"
    run("synthesize", one_part(recipe, rows=1), "--out", out)
    assert "looks" not in accepted(out)[0]
    (out / "steps.jsonl").unlink()
    file = one_part(recipe, rows=3, gates__duplicate_pictures=255)
    run("synthesize", file, "--out", out)
    assert {row["detail"] for row in lines(out / "rejected.jsonl")} == {
        "it looks like that of instruction_following-000000"
    }


@pytest.mark.long
def test_a_full_disk(server, recipe, tmp_path):
    """A real limit, under which files stop to grow in the middle of a line; with room again, nothing is paid for twice."""
    out, file = tmp_path / "made", recipe(surreal_fantasy__rows=20)
    child = command(file, out, limits={resource.RLIMIT_FSIZE: 20_000})
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 2 and "File too large; paid results are kept; free" in said.replace("\n", " ")
    some = len(ends(out))
    run("synthesize", file, "--out", out)
    assert some < 31 == len(ends(out)) == len(set(ends(out)))
    assert max(server.paid.values()) == 1
