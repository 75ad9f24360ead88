"""Step 2: ask a judge about every image. Each answer is on disk before the next one is read."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from echo4o.common.files import read_json, write_json
from echo4o.common.json_lines import JsonLines
from echo4o.common.locks import FolderLock
from echo4o.endpoints.budget import BudgetReached, Ledger
from echo4o.endpoints.cache import AnswerCache, request_key
from echo4o.endpoints.calls import Caller, run_async
from echo4o.endpoints.endpoint import CallFault, ModelAnswer
from echo4o.endpoints.json_answers import UnreadableAnswer, is_readable, read_json_answer
from echo4o.endpoints.limits import CallPolicy, ConcurrencyLimit, InterruptHandler, Stopped, StopSignal
from echo4o.endpoints.vision_probe import probe_vision
from echo4o.evaluation.benchmarks.base import Aspect, Benchmark, BenchmarkPrompt
from echo4o.evaluation.folder import JUDGE, RECORDS, SPENDING
from echo4o.evaluation.images import FoundImages, image_name
from echo4o.evaluation.judge_prompts import JudgePrompt
from echo4o.evaluation.judges.base import Judge, Question

# Faults in transport, after which a later run asks again.
RETRIED_LATER = ("http_", "timeout", "connection", "bad_response")


@dataclass(frozen=True)
class JudgingSetup:
    """What the judgements of a folder depend on. Runs with the same setup share their records."""

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
        return request_key([self.benchmark.name, self.judge, self.prompt_hashes])[:16]


@dataclass(frozen=True)
class Judgement:
    """One judgement to make: an aspect of one image, asked for the `repeat`-th time.

    Attributes:
        number: of the image among those of its prompt, from 1.
        question: None where the image is missing.
        answers_before: unreadable answers of earlier runs.
    """

    prompt: BenchmarkPrompt
    number: int
    repeat: int
    aspect: Aspect
    question: Question | None
    key: str
    image: str
    image_sha256: str | None = None
    answers_before: int = 0

    def can_read(self, answer: ModelAnswer) -> bool:
        """Whether an answer holds the verdict; only such answers are kept."""
        return self.question is not None and is_readable(answer, self.question.verdict)

    def record(self, setup: JudgingSetup, status: str, **rest: Any) -> dict[str, Any]:
        """The line of `records.jsonl`."""
        return (
            {
                "id": self.prompt.id,
                "picture": self.number,
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
class JudgingOptions:
    """How the judgements are made; none of it changes the verdicts.

    Args:
        policy: concurrency and retries.
        price: USD per million tokens (input, output).
        budget: maximum cost of the folder in USD, over all runs.
        cache: folder of paid answers; None: answers are kept in the folder of the evaluation only.
        probe: first test whether the judge sees images.
        retry_errors: ask again where the answers of an earlier run could not be read.
        on_progress: called after each judgement with (done, total, ledger).
        on_estimate: called once with (calls, input tokens, USD).
    """

    policy: CallPolicy = field(default_factory=CallPolicy)
    price: tuple[float, float] | None = None
    budget: float | None = None
    cache: Path | None = None
    probe: bool = True
    retry_errors: bool = False
    on_progress: Callable[[int, int, Ledger], None] = lambda done, total, ledger: None
    on_estimate: Callable[[int, int, float | None], None] = lambda calls, tokens, usd: None


@dataclass
class JudgingOutcome:
    """The judgements and costs of a run of the step."""

    ledger: Ledger
    asked: int = 0
    statuses: Counter = field(default_factory=Counter)


def judge_images(
    setup: JudgingSetup,
    prompts: Sequence[BenchmarkPrompt],
    found: FoundImages,
    judge: Judge,
    out: Path,
    options: JudgingOptions | None = None,
) -> JudgingOutcome:
    """Make every judgement that `out` does not hold yet.

    Raises:
        ValueError: the whole run has to stop; all answers so far are kept.
    """
    options = options or JudgingOptions()
    judgements = list(_judgements(setup, prompts, found))
    records = JsonLines(out / RECORDS)
    with (
        FolderLock(out),
        records.appending() as append,
        Ledger(out / SPENDING, options.budget, options.price) as ledger,
    ):
        outcome = JudgingOutcome(ledger)
        run = _write_setup(out, setup, found)
        waiting = _open_judgements(judgements, records, options.retry_errors)
        cache = AnswerCache(options.cache) if options.cache is not None and judge.paid else None
        expected_usd = _require_budget(waiting, cache, ledger, options) if judge.paid else 0.0
        _record_missing(setup, prompts, found, records, append)
        if not waiting:
            return outcome
        judge.keep_in(out)
        judge.prepare()

        async def run_all() -> None:
            stop = StopSignal()
            workers = min(options.policy.concurrency, judge.parallel or options.policy.concurrency, len(waiting))
            limit = ConcurrencyLimit(workers, stop)
            account = ledger.account("", judge.name, limit, expected_usd=expected_usd)
            caller = Caller(judge, options.policy, limit, stop, account, cache, run)

            def done(record: dict) -> None:
                append(record)
                outcome.asked += 1
                outcome.statuses[record["status"]] += 1
                options.on_progress(outcome.asked, len(waiting), ledger)

            await _judge_all(setup, waiting, caller, workers, options.probe and judge.needs_probe, done)

        run_async(run_all)
    return outcome


def _require_budget(
    waiting: list[Judgement], cache: AnswerCache | None, ledger: Ledger, options: JudgingOptions
) -> float:
    """Report the expected cost of the judgements; returns the USD of one. Raises BudgetReached if it is too high."""
    unpaid = [j for j in waiting if j.question is not None and not _is_kept(j, cache)]
    tokens = sum(j.question.estimate_tokens() for j in unpaid if j.question is not None)
    expected = ledger.cost_of_tokens(tokens, sum(j.aspect.answer_tokens for j in unpaid))
    if options.budget is not None:
        if expected is None:
            raise ValueError("--budget needs the price of the judge's tokens: --price IN,OUT in USD per million")
        spent = ledger.spent or 0.0
        if spent + expected > options.budget:
            raise BudgetReached(
                f"the budget is {options.budget:.2f} USD, {spent:.2f} are spent, and the {len(unpaid)} open "
                f"judgements are expected to cost about {expected:.2f}; no call was made"
            )
    options.on_estimate(len(unpaid), tokens, expected)
    return (expected or 0.0) / max(1, len(unpaid))


def _is_kept(item: Judgement, cache: AnswerCache | None) -> bool:
    kept = cache.get(request_key([item.key, 1])) if cache is not None else None
    return kept is not None and item.can_read(kept[0])


def _judgements(setup: JudgingSetup, prompts: Sequence[BenchmarkPrompt], found: FoundImages) -> Iterator[Judgement]:
    for prompt in prompts:
        for number in range(1, setup.per_prompt + 1):
            image = found.images.get((prompt.id, number))
            if image is None:
                continue
            for aspect in setup.benchmark.aspects_of(prompt):
                question = setup.prompts[aspect.prompt_name].ask(setup.benchmark, aspect, prompt, image)
                content = [
                    question.system,
                    question.text,
                    [[labelled.label, labelled.image.sha256] for labelled in question.images],
                    list(question.verdict.model_fields),
                    setup.judge,
                ]
                for repeat in range(1, setup.repeats + 1):
                    key = request_key([*content, repeat])
                    yield Judgement(prompt, number, repeat, aspect, question, key, image.path.name, image.sha256)


def _write_setup(out: Path, setup: JudgingSetup, found: FoundImages) -> str:
    """Write what the judgements depend on; returns the name under which this folder pays."""
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
        "pictures": {image_name(*key, per_prompt): image.sha256 for key, image in found.images.items()},
        "missing": {image_name(*key, per_prompt): reason for key, reason in found.missing.items()},
        "files": {image_name(*key, per_prompt): str(image.path.resolve()) for key, image in found.images.items()},
    }
    write_json(out / JUDGE, value)
    return value["run"]


def _open_judgements(judgements: list[Judgement], records: JsonLines, retry_errors: bool) -> list[Judgement]:
    latest = {record["key"]: record for record in records if record.get("key")}
    waiting = []
    for item in judgements:
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


def _record_missing(
    setup: JudgingSetup, prompts: Sequence[BenchmarkPrompt], found: FoundImages, records: JsonLines, append
) -> None:
    """Record which images are missing, unless their last record says so already."""
    latest = {(r["id"], r["picture"]): r for r in records}
    prompt_of = {prompt.id: prompt for prompt in prompts}
    for (prompt_id, number), reason in found.missing.items():
        known = latest.get((prompt_id, number), {})
        if (known.get("status"), known.get("judge")) == ("missing_image", setup.fingerprint):
            continue
        prompt, image = prompt_of[prompt_id], image_name(prompt_id, number, setup.per_prompt)
        for aspect in setup.benchmark.aspects_of(prompt):
            item = Judgement(prompt, number, 1, aspect, None, "", image)
            append(item.record(setup, "missing_image", reason=reason))


async def _judge_all(
    setup: JudgingSetup, judgements: list[Judgement], caller: Caller, workers: int, probe: bool, done
) -> None:
    """Make all judgements. When the run stops, open calls are waited for and their answers kept."""
    waiting, stop = iter(judgements), caller.stop

    async def work() -> None:
        try:
            for item in waiting:
                stop.check()
                done(await _judge(setup, item, caller))
        except Stopped:
            return
        except BaseException as error:
            stop.set(error)

    with InterruptHandler(stop):
        try:
            if probe:
                await probe_vision(caller)
            await asyncio.gather(*(work() for _ in range(workers)))
        except Stopped:
            pass
        finally:
            await caller.endpoint.close()
    if stop.reason is not None:
        raise stop.reason


async def _judge(setup: JudgingSetup, item: Judgement, caller: Caller) -> dict[str, Any]:
    """Returns the record of one judgement: a verdict, or the faults of all attempts."""
    if item.question is None:
        raise ValueError(f"{item.image} is missing and cannot be judged")
    faults: list[dict] = []
    answers = item.answers_before
    for _ in range(caller.policy.answers):
        try:
            key = request_key([item.key, answers + 1])
            answer = await caller.ask(item.question, key, faults, item.can_read)
        except CallFault as fault:
            if fault.fatal:
                raise Stopped from None
            break
        answers += 1
        try:
            verdict = read_json_answer(answer, item.question.verdict)
        except UnreadableAnswer as error:
            faults.append({"kind": error.kind, "message": str(error)})
            continue
        tries = {"attempts": len(faults) + 1, "answers": answers, "faults": faults}
        return item.record(setup, "scored", scores=verdict.scores(), reason=verdict.reason, **tries)
    tries = {"attempts": len(faults), "answers": answers, "faults": faults}
    return item.record(setup, "judge_error", reason=faults[-1]["message"], **tries)
