"""Faults, interruptions and budgets: every planned row ends exactly once, and what was paid for is not paid for again."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from echo4o.common.json_lines import JsonLines
from echo4o.testing.openai_server import API_KEY, EndpointFault
from tests.dataset_scripts.synthesis.running import PARTS, accepted, ends, lines, one_part, planned, run

ROOT = Path(__file__).parents[3]
FAULTS = [
    EndpointFault("http_429", retry_after=0.05, times=2, call_kind="generate"),
    EndpointFault("http_500", times=2, call_kind="chat"),
    EndpointFault("nothing", times=2),
    EndpointFault("no_image", call_kind="generate"),
    EndpointFault("not_json", call_kind="chat"),
    EndpointFault("late", delay=0.1, times=2),
    EndpointFault("no_choices", call_kind="chat"),
    EndpointFault("cut", match="Say this instruction"),
    EndpointFault("http_503", times=1, call_kind="edit"),
]


def test_faults_are_overcome(server, recipe, tmp_path):
    server.inject(*FAULTS)
    said = run("synthesize", recipe(), "--out", tmp_path / "made")
    assert "19 accepted, 0 rejected" in said
    assert ends(tmp_path / "made") == planned() and max(server.paid.values()) == 1


def test_what_is_not_answered_stays_open_until_it_is(server, recipe, tmp_path):
    server.inject(EndpointFault("http_500", times=6, call_kind="generate"))
    out = tmp_path / "made"
    said = run("synthesize", one_part(recipe, rate__concurrency=1), "--out", out, code=1)
    left = 3 - len(ends(out))
    assert (
        left and f"{left} not decided yet" in said and "is not decided yet: image: the server was told to fail" in said
    )
    run("synthesize", one_part(recipe, rate__concurrency=1), "--out", out)
    assert len(ends(out)) == 3 and max(server.paid.values()) == 1


def test_a_server_that_only_fails_stops_the_run(server, recipe, tmp_path):
    server.inject(EndpointFault("http_500", times=10_000, call_kind="generate"))
    file = one_part(recipe, rows=60, rate__give_up_after=3, rate__tries=1)
    said = run("synthesize", file, "--out", tmp_path / "made", code=2)
    assert "calls in a row failed" in said and not ends(tmp_path / "made")


def test_half_an_image_is_generated_again(server, recipe, tmp_path):
    server.inject(EndpointFault("half_image", call_kind="generate"))
    out = tmp_path / "made"
    run("synthesize", one_part(recipe), "--out", out)
    assert len(accepted(out)) == 3
    (step,) = [step for step in lines(out / "steps.jsonl") if step.get("rejected") == "undecodable picture"]
    assert "truncated" in step["detail"].lower() or "IEND" in step["detail"]


def test_a_request_that_is_never_taken_stops_the_run(server, recipe, tmp_path):
    server.inject(EndpointFault("http_400", message="size 64x64 is not supported", times=99, call_kind="generate"))
    said = run("synthesize", one_part(recipe), "--out", tmp_path / "made", code=2)
    assert "models.image: openai:painter does not accept our request: size 64x64 is not supported" in said
    assert not ends(tmp_path / "made")


@pytest.mark.long
def test_the_budget_ends_the_run_and_a_higher_one_continues(server, recipe, tmp_path):
    out, sums = tmp_path / "made", []
    for budget in (0.05, 0.12, 5):
        said = run("synthesize", recipe(), "--out", out, "--budget", budget, code=0 if budget == 5 else 2)
        sums.append(sum(line["usd"] for line in JsonLines(out / "spending.jsonl")))
        assert sums[-1] <= budget
        if budget < 5:
            assert "the budget of" in said and "higher --budget" in said and "paid results are kept" in said
    assert sums[0] > 0.02 and sums[1] > 0.09, "the budget is used"
    assert ends(out) == planned() and max(server.paid.values()) == 1
    assert sum(server.paid.values()) == len(list(JsonLines(out / "spending.jsonl")))


def command(file, out, *more, limits=()) -> subprocess.Popen:
    """The command in a process of its own, under resource limits."""

    def limit() -> None:
        for which in limits:
            resource.setrlimit(which, (limits[which], limits[which]))

    arguments = [
        sys.executable,
        "-m",
        "tests.dataset_scripts.synthesis.running",
        "synthesize",
        file,
        "--out",
        out,
        *more,
    ]
    return subprocess.Popen(
        list(map(str, arguments)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OPENAI_API_KEY": API_KEY}, preexec_fn=limit if limits else None,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("how, at", [(signal.SIGKILL, 25), (signal.SIGINT, 40)])
def test_interrupted_and_resumed(server, recipe, tmp_path, how, at):
    """Killed or interrupted in the middle; the second run makes the rest and pays only for that."""
    server.latency = 0.02
    out, file = tmp_path / "made", recipe(rate__concurrency=4)
    child = command(file, out)
    deadline = time.monotonic() + 60
    while len(server.calls) < at and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(how)
    said, _ = child.communicate(timeout=30)
    assert child.returncode == (-9 if how == signal.SIGKILL else 130), said
    before = ends(out)
    assert len(before) < 19
    run("synthesize", file, "--out", out)
    assert ends(out) == planned() and len(accepted(out)) == 19
    assert set(before) <= set(ends(out))
    assert max(server.paid.values()) == 1
    again = sum(count - 1 for count in Counter(call.key for call in server.calls if call.key).values())
    assert again <= (8 if how == signal.SIGKILL else 0), "only what was open when it was killed is asked for again"
    steps = Counter((step["row"], step["step"], step["attempt"]) for step in lines(out / "steps.jsonl"))
    assert max(steps.values()) == 1


@pytest.mark.long
def test_killed_again_and_again(server, recipe, tmp_path):
    """kill -9 at random points until a run comes through."""
    server.latency = 0.01
    out, file = tmp_path / "made", recipe(rate__concurrency=4, surreal_fantasy__rows=20)
    server.inject(EndpointFault("moderation", times=2, call_kind="generate"))
    chance, kills = random.Random(5), 0
    while len(ends(out)) < 31:
        child, goal = command(file, out), len(server.calls) + chance.randint(1, 30)
        while len(server.calls) < goal and child.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        kills += child.poll() is None
        child.kill()
        child.communicate(timeout=30)
        assert len(ends(out)) == len(set(ends(out)))
    run("synthesize", file, "--out", out)
    assert kills >= 4 and ends(out) == planned(PARTS | {"surreal_fantasy": 20})
    assert len(lines(out / "rejected.jsonl")) in (1, 2) and max(server.paid.values()) == 1
    again = sum(count - 1 for count in Counter(call.key for call in server.calls if call.key).values())
    assert again <= 8 * kills, "only what was open when it was killed is asked for again"
    assert set(server.paid) == {line["key"] for line in JsonLines(out / "spending.jsonl") if line["usd"]}
    run("build", out / "dataset", "--out", tmp_path / "built", "--workers", 1)


@pytest.mark.long
def test_interrupted_in_the_preview(server, recipe, tmp_path):
    server.latency = 0.05
    out = tmp_path / "made"
    child = command(recipe(rate__concurrency=2), out, "--preview", 12)
    while len(server.calls) < 8:
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=30)
    assert child.returncode == 130 and "run the same command again" in said and "Traceback" not in said
    assert (out / "preview.png").is_file()
    run("synthesize", recipe(rate__concurrency=2), "--out", out, "--preview", 12)
    assert len(ends(out)) == 12 and max(server.paid.values()) == 1


def test_a_torn_line_is_not_a_row(server, recipe, tmp_path):
    out, file = tmp_path / "made", one_part(recipe)
    run("synthesize", file, "--out", out)
    (rows,) = (out / "dataset").glob("*/rows-*.jsonl")
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-20])
    paid = sum(server.paid.values())
    run("synthesize", file, "--out", out)
    assert len(rows.read_bytes().splitlines()) == 3 and len(ends(out)) == 3
    assert sum(server.paid.values()) == paid


def test_two_processes_do_not_share_a_folder(server, recipe, tmp_path):
    from echo4o.dataset_scripts.synthesis.folder import SynthesisFolder

    with SynthesisFolder(tmp_path / "made"):
        child = command(one_part(recipe), tmp_path / "made")
        said, _ = child.communicate(timeout=60)
    assert child.returncode == 2 and f"made is in use by another process (process {os.getpid()})" in said
    assert not server.calls


@pytest.mark.long
def test_calls_keep_to_the_rate(server, recipe, tmp_path):
    times, paint = [], server.image
    server.image = lambda call: times.append(time.monotonic()) or paint(call)
    run("synthesize", one_part(recipe, rate__per_minute=300, rows=6), "--out", tmp_path / "made", "--no-probe")
    assert len(times) == 6 and max(times) - min(times) >= 4 * 0.2
    assert server.peak <= 3 * 4, "concurrency holds for each of three models"
