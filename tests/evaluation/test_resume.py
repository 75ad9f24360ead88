"""Kill it anywhere, run it again: the same result, and nothing is asked or paid for twice."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
import time

import pytest

from echo4o.common.json_lines import JsonLines
from echo4o.common.locks import FolderLock
from echo4o.evaluation.score import score_folder
from echo4o.testing.openai_server import OpenAIServer
from tests.evaluation import running
from tests.evaluation.conftest import even_is_correct, write_pictures, write_prompts

COUNT, CONCURRENCY = 48, 4


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["openai", "tests.evaluation.running"])
    return context


@pytest.fixture
def slow_server():
    with OpenAIServer(latency=0.03) as server:
        server.verdict = even_is_correct
        yield server


@pytest.fixture
def set_up(tmp_path):
    prompts = write_prompts(tmp_path / "prompts.jsonl", COUNT)
    return prompts, write_pictures(tmp_path / "pictures", COUNT)


def begin(processes, server, arguments, target=running.judge):
    """Start a run and wait until its first judgement is asked for."""
    before = len(server.judged)
    process = processes.Process(target=target, args=arguments)
    process.start()
    while len(server.judged) == before and process.is_alive():
        time.sleep(0.002)
    return process


def answered(out, cache) -> set[str]:
    """The calls whose answers are on disk."""
    return {path.stem for path in cache.rglob("*.json")} | {line["key"] for line in JsonLines(out / "spending.jsonl")}


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_kill_9_at_random_points(seed, processes, slow_server, set_up, tmp_path):
    server, dice = slow_server, random.Random(seed)
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments = (server.url, *set_up, out, cache, CONCURRENCY)
    kills = 0
    while kills < 3:
        known = answered(out, cache)
        asked = len(server.calls)
        process = begin(processes, server, arguments)
        time.sleep(dice.uniform(0.0, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert not known & {call.key for call in server.calls[asked:]}, "a kept answer was asked for again"
    # A crash of the machine can also tear the last line.
    with (out / "records.jsonl").open("ab") as file:
        file.write(b'{"id": "7", "status": "sco')
    records = len(list(JsonLines(out / "records.jsonl")))
    assert 0 < records < COUNT
    running.judge(*arguments)

    assert sum(server.paid.values()) == COUNT + 1  # every judgement and the probe, once
    assert len(server.calls) <= COUNT + 1 + kills * CONCURRENCY
    spending = list(JsonLines(out / "spending.jsonl"))
    assert len({line["key"] for line in spending}) == len(spending) == COUNT + 1
    calm = tmp_path / "calm"
    running.judge(server.url, *set_up, calm, None, CONCURRENCY)
    score_folder(out), score_folder(calm)
    assert (out / "result.json").read_bytes() == (calm / "result.json").read_bytes()
    assert json.loads((out / "result.json").read_text())["score"] == 0.5


def test_interrupt_keeps_every_call_that_is_open(processes, slow_server, set_up, tmp_path):
    server = slow_server
    out, cache = tmp_path / "out", tmp_path / "cache"
    arguments = (server.url, *set_up, out, cache, CONCURRENCY)
    process = begin(processes, server, arguments, running.interrupted)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 130
    records = list(JsonLines(out / "records.jsonl"))
    assert len(records) == len(server.judged) == sum(server.paid.values()) - 1 < COUNT
    running.judge(*arguments)
    assert len(server.judged) == COUNT  # not one call more
    assert score_folder(out)["coverage"] == 1.0


def test_a_second_run_asks_nothing(slow_server, set_up, tmp_path):
    arguments = (slow_server.url, *set_up, tmp_path / "out", tmp_path / "cache", 16)
    running.judge(*arguments)
    score_folder(tmp_path / "out")
    before = (tmp_path / "out" / "result.json").read_bytes()
    calls = len(slow_server.calls)
    running.judge(*arguments)
    score_folder(tmp_path / "out")
    assert len(slow_server.calls) == calls
    assert (tmp_path / "out" / "result.json").read_bytes() == before


def test_another_folder_is_served_from_the_cache(slow_server, set_up, tmp_path):
    cache = tmp_path / "cache"
    running.judge(slow_server.url, *set_up, tmp_path / "a", cache, 16)
    calls = len(slow_server.calls)
    running.judge(slow_server.url, *set_up, tmp_path / "b", cache, 16)
    assert len(slow_server.calls) == calls
    assert score_folder(tmp_path / "a") == score_folder(tmp_path / "b")
    assert list(JsonLines(tmp_path / "b" / "spending.jsonl")) == []


def test_two_processes_do_not_judge_into_one_folder(set_up, slow_server, tmp_path):
    out = tmp_path / "out"
    with FolderLock(out), pytest.raises(ValueError, match=f"out is in use by another process .process {os.getpid()}."):
        running.judge(slow_server.url, *set_up, out, None)
    assert not slow_server.calls


def test_changed_images_and_questions_are_judged_again(slow_server, set_up, tmp_path):
    out, (prompts, pictures) = tmp_path / "out", set_up
    running.judge(slow_server.url, prompts, pictures, out, None, 16)
    calls = len(slow_server.judged)
    (pictures / "5.png").write_bytes((pictures / "6.png").read_bytes())
    with pytest.raises(ValueError, match=r"1 images have changed since they were judged \(5\)"):
        score_folder(out)
    running.judge(slow_server.url, prompts, pictures, out, None, 16)
    assert len(slow_server.judged) == calls + 1
    assert score_folder(out)["score"] == pytest.approx((1 + 1 / 24) / 2)


def test_calls_in_flight_reach_the_concurrency_and_never_exceed_it(server, set_up, tmp_path):
    """Counted and not timed: the first 32 are answered only when all 32 are open."""
    together, begun = threading.Barrier(32, timeout=20), itertools.count()

    def verdict(call):
        if next(begun) < 32:
            together.wait()
        return even_is_correct(call)

    server.verdict = verdict
    running.judge(server.url, *set_up, tmp_path / "out", None, 32)
    assert server.peak == 32
    assert score_folder(tmp_path / "out")["coverage"] == 1.0
