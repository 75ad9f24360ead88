"""The gate, the ledger and the cache of paid answers, each alone."""

import asyncio
import json
import time

import pytest

from echo4o.common.json_lines import JsonLines
from echo4o.endpoints.budget import BudgetReached, Ledger
from echo4o.endpoints.cache import AnswerCache
from echo4o.endpoints.calls import Caller
from echo4o.endpoints.chat_endpoint import ChatRequest
from echo4o.endpoints.endpoint import Endpoint, ModelAnswer
from echo4o.endpoints.limits import CallPolicy, ConcurrencyLimit, Stopped, StopSignal

REQUEST = ChatRequest("is it?")


class Counted(Endpoint):
    name, paid = "counted", True

    def __init__(self):
        self.asked = 0

    def identity(self):
        return {"judge": self.name}

    async def ask(self, question, key):
        self.asked += 1
        return ModelAnswer("yes", input_tokens=1000, output_tokens=100)


def test_the_gate_halves_on_429_and_recovers():
    async def main():
        gate = ConcurrencyLimit(16, StopSignal())
        gate.slow_down(began=1.0, wait=0.0)
        first = gate.limit
        gate.slow_down(began=0.5, wait=0.0)  # was open at the same time: counts once
        assert (first, gate.limit) == (8, 8)
        for _ in range(8):
            gate.succeeded()
        assert gate.limit == 9

    asyncio.run(main())


def test_the_gate_lets_no_more_in_than_its_limit():
    async def main():
        gate = ConcurrencyLimit(2, StopSignal())
        gate.slow_down(began=1.0, wait=0.0)
        await gate.enter()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gate.enter(), 0.1)
        gate.leave()
        await asyncio.wait_for(gate.enter(), 5)
        assert gate.peak == 1

    asyncio.run(main())


def test_a_429_pauses_everyone():
    async def main():
        gate = ConcurrencyLimit(2, StopSignal())
        gate.slow_down(began=1.0, wait=0.3)
        start = time.monotonic()
        await gate.enter()
        assert time.monotonic() - start >= 0.3

    asyncio.run(main())


def test_a_stop_ends_every_wait():
    async def main():
        stop = StopSignal()
        gate = ConcurrencyLimit(1, stop)
        gate.slow_down(began=1.0, wait=1000.0)
        waiting = [asyncio.create_task(gate.enter()), asyncio.create_task(stop.sleep(1000.0))]
        await asyncio.sleep(0.01)
        stop.set(ValueError("first"))
        stop.set(ValueError("second"))
        found = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
        assert [type(error) for error in found] == [Stopped, Stopped]
        assert str(stop.reason) == "first"

    asyncio.run(main())


def ask(judge, ledger, cache, run, key="k"):
    async def main():
        stop = StopSignal()
        limit = ConcurrencyLimit(1, stop)
        with ledger:
            caller = Caller(judge, CallPolicy(), limit, stop, ledger.account("", "counted", limit), cache, run)
            return await caller.ask(REQUEST, key, [])

    return asyncio.run(main())


def test_an_answer_is_paid_once_and_accounted_once(tmp_path):
    judge, cache = Counted(), AnswerCache(tmp_path / "cache")
    ledger = Ledger(tmp_path / "a.jsonl", token_price=(10.0, 10.0))
    assert ask(judge, ledger, cache, "a") == ask(judge, ledger, cache, "a")
    assert judge.asked == 1 and ledger.calls == 1 and ledger.spent == pytest.approx(0.011)
    # Killed after the answer was kept and before it was accounted for: the next run accounts for it.
    (tmp_path / "a.jsonl").unlink()
    ledger = Ledger(tmp_path / "a.jsonl", token_price=(10.0, 10.0))
    ask(judge, ledger, cache, "a")
    assert judge.asked == 1 and ledger.calls == 1 and len(list(JsonLines(tmp_path / "a.jsonl"))) == 1
    # Another folder takes the answer for nothing.
    other = Ledger(tmp_path / "b.jsonl", token_price=(10.0, 10.0))
    ask(judge, other, cache, "b")
    assert judge.asked == 1 and (other.calls, other.kept) == (0, 1)
    # What earlier runs spent is known to the next one.
    assert Ledger(tmp_path / "a.jsonl", token_price=(10.0, 10.0)).spent == pytest.approx(0.011)


def test_a_damaged_kept_answer_is_asked_for_again(tmp_path):
    judge, cache = Counted(), AnswerCache(tmp_path / "cache")
    ledger = Ledger(tmp_path / "a.jsonl")
    ask(judge, ledger, cache, "a")
    (file,) = (tmp_path / "cache").rglob("*.json")
    file.write_text('{"answer"')
    ask(judge, ledger, cache, "a")
    assert judge.asked == 2


def test_the_next_call_has_to_fit(tmp_path):
    ledger = Ledger(tmp_path / "a.jsonl", token_price=(10.0, 10.0), budget=0.03)
    limit = ConcurrencyLimit(3, StopSignal())
    account = ledger.account("", "counted", limit, expected_usd=0.011)
    limit.open = 2
    account.require_room()
    limit.open = 3
    with pytest.raises(BudgetReached, match="higher --budget"):
        account.require_room()


def test_lines_of_judges_and_of_synthesis_are_one_ledger(tmp_path):
    path = tmp_path / "spending.jsonl"
    priced = {"key": "b", "role": "image", "model": "m", "input_tokens": 5, "output_tokens": 7, "usd": 0.02}
    path.write_text("".join(json.dumps(line) + "\n" for line in (
        {"key": "a", "input_tokens": 1000, "output_tokens": 100}, priced,
    )))  # fmt: skip
    ledger = Ledger(path, token_price=(10.0, 10.0))
    assert (ledger.calls, ledger.calls_by_role["image"], ledger.input_tokens) == (2, 1, 1005)
    assert ledger.spent == pytest.approx(0.031)
    assert Ledger(path).spent is None, "the price of a call is unknown"
    limit = ConcurrencyLimit(1, StopSignal())
    with ledger:
        account = ledger.account("image", "m", limit, usd_of=lambda answer: 0.05)
        account.add("b", ModelAnswer(""))
        account.add("c", ModelAnswer("", input_tokens=1))
    assert list(JsonLines(path))[-1] == {
        "key": "c", "role": "image", "model": "m", "input_tokens": 1, "output_tokens": 0, "usd": 0.05
    }  # fmt: skip
    assert ledger.calls == 3


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"tries": 0}, {"first_wait": -1.0}])
def test_impatience_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CallPolicy(**wrong)
