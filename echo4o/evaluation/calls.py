"""Calls to a judge: bounded, patient, counted, and never paid for twice."""

import asyncio
import json
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic

from echo4o.common.files import write_text
from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.judges.base import Answer, Judge, JudgeFault, Question

# USD per million tokens, as listed when the model came out (April 2025). Say `--price IN,OUT` for what you pay.
KNOWN_PRICES = {"gpt-4.1-2025-04-14": (2.0, 8.0), "gpt-4.1-mini-2025-04-14": (0.4, 1.6)}
_OUTPUT_GUESS = 200  # tokens of a verdict with its reason


@dataclass(frozen=True)
class Policy:
    """How patient the caller is.

    Args:
        concurrency: most calls that are open at once.
        tries: how often one call is sent before its failure is accepted.
        answers: how many answers are asked for before an unreadable one is accepted as an error.
        first_wait, longest_wait: seconds of the exponential backoff; each wait is drawn from its upper half.
        longest_request: a server that asks for a longer wait than this is believed and not asked again.
        give_up_after: judgements in a row that fail in transport before the run stops.
    """

    concurrency: int = 16
    tries: int = 6
    answers: int = 3
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_request: float = 300.0
    give_up_after: int = 8

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < 0 or (value < 1 and isinstance(value, int)):
                raise ValueError(f"{name} is {value}; it must be at least 1")


class BudgetReached(ValueError):
    """The next call could exceed the budget."""


class Stopped(Exception):
    """The run ends; nothing new is begun."""


class Stop:
    """Set once, with the reason; waits end at once."""

    def __init__(self):
        self._event, self.reason = asyncio.Event(), None

    def set(self, reason: BaseException) -> None:
        if self.reason is None:
            self.reason = reason
        self._event.set()

    def check(self) -> None:
        if self._event.is_set():
            raise Stopped

    async def sleep(self, seconds: float) -> None:
        """Wait, but no longer than until the stop."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise Stopped


class Interrupts:
    """Ctrl-C and SIGTERM end the run after the calls that are open; a second one ends it at once."""

    def __init__(self, stop: Stop):
        self.stop, self.signals = stop, []

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                loop.add_signal_handler(number, self._heard, number)
            except (NotImplementedError, RuntimeError):
                continue
            self.signals.append(number)

    def _heard(self, number: int) -> None:
        self.stop.set(KeyboardInterrupt())
        self._let_go()

    def __exit__(self, *_):
        self._let_go()

    def _let_go(self) -> None:
        loop = asyncio.get_running_loop()
        while self.signals:
            loop.remove_signal_handler(self.signals.pop())


class Gate:
    """How many calls may be open: halved when the server says "too many", one more after each round of successes."""

    def __init__(self, most: int, stop: Stop):
        self.most = self.limit = most
        self.open, self.peak = 0, 0
        self._stop, self._resume_at, self._slowed_at, self._successes = stop, 0.0, 0.0, 0

    async def enter(self) -> None:
        while True:
            self._stop.check()
            pause = self._resume_at - monotonic()
            if pause <= 0 and self.open < self.limit:
                break
            await self._stop.sleep(min(max(pause, 0.005), 0.05))
        self.open += 1
        self.peak = max(self.peak, self.open)

    def leave(self) -> None:
        self.open -= 1

    def succeeded(self) -> None:
        self._successes += 1
        if self._successes >= self.limit:
            self._successes, self.limit = 0, min(self.most, self.limit + 1)

    def slow_down(self, began: float, wait: float) -> None:
        """After a 429 of a call that began at `began`; the calls that were open together count once."""
        self._resume_at = max(self._resume_at, monotonic() + wait)
        if began >= self._slowed_at:
            self._slowed_at, self._successes = monotonic(), 0
            self.limit = max(1, self.limit // 2)


@dataclass
class Ledger:
    """Tokens and money that a folder's judgements have cost so far, over all runs into it."""

    path: Path
    price: tuple[float, float] | None = None
    budget: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    calls: int = 0
    kept: int = 0  # answers that were taken from the cache in this run
    _known: set[str] = field(default_factory=set)

    def __post_init__(self):
        for line in JsonLines(self.path):
            self._count(line["key"], line["input_tokens"], line["output_tokens"])

    def _count(self, key: str, input_tokens: int, output_tokens: int) -> None:
        self._known.add(key)
        self.calls += 1
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens

    def add(self, key: str, answer: Answer, append: Callable[[dict], None]) -> None:
        if key not in self._known:
            append({"key": key, "input_tokens": answer.input_tokens, "output_tokens": answer.output_tokens})
            self._count(key, answer.input_tokens, answer.output_tokens)

    def cost(self, input_tokens: float, output_tokens: float) -> float | None:
        """USD, or None where no price is known."""
        if self.price is None:
            return None
        return (input_tokens * self.price[0] + output_tokens * self.price[1]) / 1e6

    @property
    def spent(self) -> float | None:
        return self.cost(self.input_tokens, self.output_tokens)

    def require_room(self, questions: list[Question]) -> tuple[int, float | None]:
        """Expected input tokens and USD of all questions; BudgetReached if the budget cannot suffice."""
        tokens = sum(estimate_tokens(question) for question in questions)
        expected = self.cost(tokens, _OUTPUT_GUESS * len(questions))
        if self.budget is not None:
            if expected is None:
                raise ValueError("--budget needs the price of the judge's tokens: --price IN,OUT in USD per million")
            if self.spent + expected > self.budget:
                raise BudgetReached(
                    f"the budget is {self.budget:.2f} USD, {self.spent:.2f} are spent, and the {len(questions)} open "
                    f"judgements are expected to cost about {expected:.2f}; nothing was asked"
                )
        return tokens, expected

    def require_next(self, open_calls: int, guess: float) -> None:
        """BudgetReached if the open calls and one more could exceed the budget."""
        if self.budget is None:
            return
        each = max(self.spent / self.calls if self.calls else 0.0, 0.0) or guess
        if self.spent + (open_calls + 1) * each > self.budget:
            raise BudgetReached(
                f"the budget of {self.budget:.2f} USD is reached: {self.spent:.4f} spent, {self.calls} calls; all "
                "answers are kept, run again with a higher --budget to go on"
            )


def estimate_tokens(question: Question) -> int:
    """About how many input tokens a question has: 4 letters each, pictures in tiles of 512 pixels as OpenAI counts."""
    from PIL import Image

    total = (len(question.text) + len(question.system)) // 4
    for shown in question.shown:
        with Image.open(shown.picture.path) as picture:
            width, height = picture.size
        scale = min(1.0, 2048 / max(width, height))
        scale *= min(1.0, 768 / (min(width, height) * scale))
        tiles = -(-int(width * scale) // 512) * -(-int(height * scale) // 512)
        total += 85 + 170 * tiles
    return total


class AnswerCache:
    """Answers that were paid for, one file per key."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> tuple[Answer, str] | None:
        """The answer and the run that paid for it."""
        try:
            stored = json.loads(self._path(key).read_text("utf-8"))
            return Answer(**stored["answer"]), stored["run"]
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None

    def put(self, key: str, answer: Answer, run: str) -> None:
        data = json.dumps({"answer": asdict(answer), "run": run})  # ASCII: escapes keep what is no valid Unicode, too
        write_text(self._path(key), data, shared=True)


@dataclass
class Caller:
    """Asks a judge, repeats what can be repeated, and keeps what was answered.

    Nothing here looks into the question: whatever answers as a [`Judge`] does, such as a model that draws, can be asked.
    """

    judge: Judge
    policy: Policy
    gate: Gate
    stop: Stop
    ledger: Ledger
    append_cost: Callable[[dict], None]
    cache: AnswerCache | None = None
    run: str = ""
    guess: float = 0.0
    _failed_in_a_row: int = 0

    async def ask(self, question: Question, key: str, faults: list[dict]) -> Answer:
        """The answer of this key: kept, or paid for. Raises [`JudgeFault`] with every try noted in `faults`."""
        kept = self.cache.get(key) if self.cache else None
        if kept is not None:
            answer, run = kept
            self.ledger.kept += 1
            if run == self.run:  # paid for by this folder, and killed before it was written down
                self.ledger.add(key, answer, self.append_cost)
            return answer
        answer = await self._try(question, key, faults)
        if self.cache:
            self.cache.put(key, answer, self.run)
        self.ledger.add(key, answer, self.append_cost)
        return answer

    async def _try(self, question: Question, key: str, faults: list[dict]) -> Answer:
        for number in range(1, self.policy.tries + 1):
            await self.gate.enter()
            began = monotonic()
            try:
                if self.judge.paid:
                    self.ledger.require_next(self.gate.open - 1, self.guess)
                answer = await self.judge.ask(question, key)
            except JudgeFault as fault:
                faults.append({"kind": fault.kind, "message": str(fault)})
                wait = self._after(fault, number, began)
                failure = fault
            else:
                self.gate.succeeded()
                self._failed_in_a_row = 0
                return answer
            finally:
                self.gate.leave()
            if wait is None:
                self._note_failure(failure)
                raise failure
            await self.stop.sleep(wait)
        raise AssertionError("unreachable")

    def _after(self, fault: JudgeFault, number: int, began: float) -> float | None:
        """Seconds until the next try, or None if there is none."""
        wait = self.policy.first_wait * 2 ** (number - 1)
        wait = min(wait, self.policy.longest_wait) * random.uniform(0.5, 1.0)
        if fault.wait is not None:
            wait = max(fault.wait, wait if fault.wait == 0 else 0.0)
        if fault.kind == "http_429" and wait <= self.policy.longest_request:
            self.gate.slow_down(began, wait)
        if not fault.retry or number == self.policy.tries or wait > self.policy.longest_request:
            return None
        return wait

    def _note_failure(self, fault: JudgeFault) -> None:
        self._failed_in_a_row += 1
        if fault.fatal:
            self.stop.set(ValueError(f"{self.judge.name}: {fault} ({fault.kind})"))
        elif fault.retry and self._failed_in_a_row >= self.policy.give_up_after:
            self.stop.set(
                ValueError(
                    f"{self.judge.name}: {self._failed_in_a_row} judgements in a row failed, the last one with "
                    f"{fault.kind}: {fault}; what was answered is kept, run again to go on"
                )
            )
