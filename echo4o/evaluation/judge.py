"""Step 2: ask a judge about every picture; each answer is on disk before the next one is looked at."""

import asyncio
import hashlib
import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echo4o.common.files import read_json, write_json
from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.benchmarks.base import Aspect, Benchmark, Prompt
from echo4o.evaluation.calls import (
    AnswerCache,
    Caller,
    Gate,
    Interrupts,
    Ledger,
    Policy,
    Stop,
    Stopped,
)
from echo4o.evaluation.folder import JUDGE, RECORDS, SPENDING
from echo4o.evaluation.judges.base import Judge, JudgeFault, Question
from echo4o.evaluation.judges.reading import Unreadable, read_verdict
from echo4o.evaluation.pictures import Found, picture_name
from echo4o.evaluation.probe import look_at_probe
from echo4o.evaluation.questions import JudgePrompt

# Faults in transport: nothing was answered, so that a later run asks again.
RETRIED_LATER = ("http_", "timeout", "connection", "bad_response")


def digest(value: Any) -> str:
    """The hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Setup:
    """What the judgements of a folder rest on; two runs with the same setup may share their records."""

    benchmark: Benchmark
    judge: dict[str, Any]  # its identity
    prompts: dict[str, JudgePrompt]  # by aspect
    per_prompt: int = 1
    repeats: int = 1

    @property
    def prompt_hashes(self) -> dict[str, str]:
        return {aspect: prompt.sha256 for aspect, prompt in self.prompts.items()}

    @property
    def fingerprint(self) -> str:
        return digest([self.benchmark.name, self.judge, self.prompt_hashes])[:16]


@dataclass(frozen=True)
class Item:
    """One judgement to be made."""

    prompt: Prompt
    picture: int
    repeat: int
    aspect: Aspect
    question: Question
    key: str
    image: str
    image_sha256: str | None = None
    answers_before: int = 0  # unreadable ones, of earlier runs

    def record(self, setup: Setup, status: str, **rest: Any) -> dict[str, Any]:
        return (
            {
                "id": self.prompt.id,
                "picture": self.picture,
                "repeat": self.repeat,
                "aspect": self.aspect.name,
                "group": self.prompt.group,
                "type": self.prompt.type,
                "status": status,
                "scores": None,
                "reason": "",
                "attempts": 0,
                "answers": 0,
                "faults": [],
            }
            | rest
            | {
                "image": self.image,
                "image_sha256": self.image_sha256,
                "key": self.key,
                "judge": setup.fingerprint,
            }
        )


@dataclass(frozen=True)
class Options:
    """How the judgements are made; none of it changes what they say.

    Args:
        policy: concurrency and patience.
        price, budget: USD per million tokens (in, out), and the most that may be spent into this folder.
        cache: folder of paid answers; None: nothing is kept beyond the folder of the evaluation.
        probe: first see whether the judge can see at all.
        retry_errors: ask again where an earlier run got answers that could not be read.
        on_progress: called after each judgement as (done, total, ledger); on_estimate once as (calls, tokens, USD).
    """

    policy: Policy = field(default_factory=Policy)
    price: tuple[float, float] | None = None
    budget: float | None = None
    cache: Path | None = None
    probe: bool = True
    retry_errors: bool = False
    on_progress: Callable[[int, int, Ledger], None] = lambda done, total, ledger: None
    on_estimate: Callable[[int, int, float | None], None] = lambda calls, tokens, usd: None


@dataclass
class Outcome:
    """What a run of the step did."""

    ledger: Ledger
    asked: int = 0
    statuses: Counter = field(default_factory=Counter)


def judge_pictures(
    setup: Setup, prompts: Sequence[Prompt], found: Found, judge: Judge, out: Path, options: Options | None = None
) -> Outcome:
    """Make every judgement that `out` does not hold yet.

    Raises:
        ValueError: for what stops the whole run; all answers so far are kept.
    """
    options = options or Options()
    items = list(_items(setup, prompts, found))
    with JsonLines(out / RECORDS).appending() as append, JsonLines(out / SPENDING).appending() as append_cost:
        run = _write_setup(out, setup, found)
        outcome = Outcome(Ledger(out / SPENDING, options.price, options.budget))
        waiting = _open_items(items, JsonLines(out / RECORDS), options.retry_errors)
        kept = AnswerCache(options.cache) if options.cache is not None and judge.paid else None
        guess = _require_room(waiting, kept, outcome.ledger, options) if judge.paid else 0.0
        _record_missing(setup, prompts, found, JsonLines(out / RECORDS), append)
        if not waiting:
            return outcome
        judge.prepare()

        async def run_all() -> None:
            stop = Stop()
            workers = min(options.policy.concurrency, judge.parallel or options.policy.concurrency, len(waiting))
            gate = Gate(workers, stop)
            caller = Caller(judge, options.policy, gate, stop, outcome.ledger, append_cost, kept, run, guess)

            def done(record: dict) -> None:
                append(record)
                outcome.asked += 1
                outcome.statuses[record["status"]] += 1
                options.on_progress(outcome.asked, len(waiting), outcome.ledger)

            await _work_off(setup, waiting, caller, workers, options.probe, done)

        run_async(run_all)
    return outcome


def _require_room(waiting: list[Item], kept: AnswerCache | None, ledger: Ledger, options: Options) -> float:
    """Tell what the judgements are expected to cost, or refuse; returns the expected USD of one."""
    unpaid = [item for item in waiting if kept is None or kept.get(digest([item.key, 1])) is None]
    tokens, expected = ledger.require_room([item.question for item in unpaid])
    options.on_estimate(len(unpaid), tokens, expected)
    return (expected or 0.0) / max(1, len(unpaid))


def _items(setup: Setup, prompts: Sequence[Prompt], found: Found) -> Iterator[Item]:
    for prompt in prompts:
        for number in range(1, setup.per_prompt + 1):
            picture = found.pictures.get((prompt.id, number))
            if picture is None:
                continue
            for aspect in setup.benchmark.aspects:
                question = setup.prompts[aspect.name].ask(setup.benchmark, aspect, prompt, picture)
                content = [
                    question.system,
                    question.text,
                    [[shown.label, shown.picture.sha256] for shown in question.shown],
                    list(question.verdict.model_fields),
                    setup.judge,
                ]
                for repeat in range(1, setup.repeats + 1):
                    key = digest([*content, repeat])
                    yield Item(prompt, number, repeat, aspect, question, key, picture.path.name, picture.sha256)


def _write_setup(out: Path, setup: Setup, found: Found) -> str:
    """Say in the folder what its judgements rest on; returns the name under which this folder pays."""
    known = read_json(out / JUDGE) or {}
    per_prompt = setup.per_prompt
    value = {
        "benchmark": setup.benchmark.name,
        "judge": setup.judge,
        "prompt_hashes": setup.prompt_hashes,
        "fingerprint": setup.fingerprint,
        "pictures_per_prompt": per_prompt,
        "repeats": setup.repeats,
        "run": known.get("run") or uuid.uuid4().hex,
        "pictures": {picture_name(*key, per_prompt): picture.sha256 for key, picture in found.pictures.items()},
        "missing": {picture_name(*key, per_prompt): reason for key, reason in found.missing.items()},
        "files": {picture_name(*key, per_prompt): str(p.path.resolve()) for key, p in found.pictures.items()},
    }
    write_json(out / JUDGE, value)
    return value["run"]


def _open_items(items: list[Item], records: JsonLines, retry_errors: bool) -> list[Item]:
    latest = {record["key"]: record for record in records if record.get("key")}
    waiting = []
    for item in items:
        record = latest.get(item.key)
        if _is_open(record, retry_errors):
            waiting.append(replace(item, answers_before=record["answers"] if record else 0))
    return waiting


def _is_open(record: dict | None, retry_errors: bool) -> bool:
    if record is None or record["status"] == "missing_image":
        return True
    if record["status"] == "scored":
        return False
    last = record["faults"][-1]["kind"] if record["faults"] else ""
    return retry_errors or last.startswith(RETRIED_LATER)


def _record_missing(setup: Setup, prompts: Sequence[Prompt], found: Found, records: JsonLines, append) -> None:
    """Write down which pictures are missing, unless the last word about them says so already."""
    latest = {(r["id"], r["picture"]): r for r in records}
    of = {prompt.id: prompt for prompt in prompts}
    for (prompt_id, number), reason in found.missing.items():
        known = latest.get((prompt_id, number), {})
        if (known.get("status"), known.get("judge")) == ("missing_image", setup.fingerprint):
            continue
        prompt, image = of[prompt_id], picture_name(prompt_id, number, setup.per_prompt)
        for aspect in setup.benchmark.aspects:
            item = Item(prompt, number, 1, aspect, None, "", image)
            append(item.record(setup, "missing_image", reason=reason))


async def _work_off(setup: Setup, items: list[Item], caller: Caller, workers: int, probe: bool, done) -> None:
    """Judge all items; on a stop, what is already asked for is waited for and kept."""
    waiting, stop = iter(items), caller.stop

    async def work() -> None:
        try:
            for item in waiting:
                stop.check()
                done(await _judge(setup, item, caller))
        except Stopped:
            return
        except BaseException as error:
            stop.set(error)

    with Interrupts(stop):
        try:
            if probe:
                await look_at_probe(caller)
            await asyncio.gather(*(work() for _ in range(workers)))
        except Stopped:
            pass
        finally:
            await caller.judge.close()
    if stop.reason is not None:
        raise stop.reason


async def _judge(setup: Setup, item: Item, caller: Caller) -> dict[str, Any]:
    """One judgement, to its end: a verdict, or the reasons why there is none."""
    faults: list[dict] = []
    answers = item.answers_before
    for _ in range(caller.policy.answers):
        try:
            answer = await caller.ask(item.question, digest([item.key, answers + 1]), faults)
        except JudgeFault as fault:
            if fault.fatal:
                raise Stopped from None
            break
        answers += 1
        try:
            verdict = read_verdict(answer, item.question.verdict)
        except Unreadable as error:
            faults.append({"kind": error.kind, "message": str(error)})
            continue
        tries = {"attempts": len(faults) + 1, "answers": answers, "faults": faults}
        return item.record(setup, "scored", scores=verdict.scores(), reason=verdict.reason, **tries)
    tries = {"attempts": len(faults), "answers": answers, "faults": faults}
    return item.record(setup, "judge_error", reason=faults[-1]["message"], **tries)


def run_async(make_coroutine: Callable[[], Any]) -> None:
    """Run a coroutine to its end, also where a loop is already running (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(make_coroutine())
        return
    failure: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(make_coroutine())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
