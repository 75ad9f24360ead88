"""The calls of `echo4o dataset synthesize`: the evaluation's patience, kept answers and judges, for models that write and draw."""

import asyncio
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

from echo4o.common.files import write_bytes
from echo4o.common.json_lines import JsonLines
from echo4o.dataset_scripts.synthesis.calls import Check, Ended, Refused, Unanswered, Unreadable, Verdict
from echo4o.dataset_scripts.synthesis.folder import ANSWERS, SPENDING
from echo4o.dataset_scripts.synthesis.plan import guess
from echo4o.dataset_scripts.synthesis.recipe import Endpoint, Image, Recipe
from echo4o.evaluation.benchmarks.base import PROMPTS, Aspect, Benchmark, Prompt
from echo4o.evaluation.benchmarks.genevalpp import Correct, GenEvalPP
from echo4o.evaluation.calls import AnswerCache, BudgetReached, Caller, Gate, Interrupts, Policy, Stop, Stopped
from echo4o.evaluation.image_endpoint import Drawing, ImageModel, is_moderation, missing_models, picture_bytes
from echo4o.evaluation.judge import digest
from echo4o.evaluation.judges import Answer, Judge, JudgeFault, Question, make_judge
from echo4o.evaluation.judges import reading as readings
from echo4o.evaluation.judges.endpoint import OpenAIEndpoint, OpenAIJudge, public
from echo4o.evaluation.pictures import Picture
from echo4o.evaluation.probe import look_at_probe
from echo4o.evaluation.purse import Purse
from echo4o.evaluation.questions import JudgePrompt

_LOST = (
    "does not exist",
    "not exist or",
    "deprecated",
    "shut down",
    "retired",
    "decommissioned",
    "no longer available",
)


class Note(Benchmark):
    """Not a benchmark to run: what a judge is asked about a picture that has no structure, only a note in words."""

    name, title, groups, scale = "synthesis_note", "Synthesis", (), 1.0
    aspects = (Aspect("correct", "synthesis_note.md", Correct, shows_references=True),)

    def read_row(self, row: dict, number: int, folder: Path) -> Prompt:
        raise ValueError("synthesis_note has no prompt file")

    def question(self, prompt: Prompt) -> dict[str, Any]:
        return {"instruction": prompt.text, "note": prompt.facts["note"]}

    def sample_score(self, scores: dict[str, float]) -> float:
        return scores["correct"]

    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        return {"score": dict.fromkeys(counts, 1.0)}


class _Pace:
    """One turn every so many seconds."""

    def __init__(self, per_minute: int | None, stop: Stop):
        self._every, self._stop, self._next = 60.0 / per_minute if per_minute else 0.0, stop, 0.0

    async def turn(self) -> None:
        now = monotonic()
        turn, self._next = max(now, self._next), max(now, self._next) + self._every
        if turn > now:
            await self._stop.sleep(turn - now)


class _Paced:
    """A model that keeps to a pace; roles that are played by the same model share one."""

    def __init__(self, model, pace: _Pace):
        self.model, self.pace, self.name, self.paid = model, pace, model.name, model.paid
        self.identity, self.close = model.identity, model.close

    async def ask(self, question, key: str) -> Answer:
        await self.pace.turn()
        return await self.model.ask(question, key)


class RobustCalls:
    """The models of a recipe, in an `async with`; afterwards `reason` says what ended the run, if anything did.

    Args:
        out: the folder of the synthesis: answers and costs are kept there.
        roles: the models that its rows need (text, image, edit, judge).
        budget: USD that the folder may cost in all.
        see: whether the judge is shown a test picture first.

    Raises:
        ValueError: a key that is not set, a budget without prices or of nothing.
    """

    def __init__(self, recipe: Recipe, out: Path, roles: Sequence[str], budget: float | None = None, see: bool = True):
        self.recipe, self.out, self.see = recipe, out, see
        self.stop, self._locks, self._identities, self._not_taken = Stop(), {}, {}, Counter()
        self.models = {role: _make_model(role, getattr(recipe.models, role)) for role in roles}
        _require_prices(recipe, self.models, budget)
        self.purse = Purse(out / SPENDING, budget)
        if budget is not None and self.purse.spent >= budget:
            raise BudgetReached(
                f"the budget is {budget:g} USD and {self.purse.spent:.4f} are spent: nothing can be asked; give a higher "
                "--budget"
            )
        self.names = {role: model.name.removeprefix("openai:") for role, model in self.models.items()}
        self._structure, self._note = (
            (benchmark, JudgePrompt.read(PROMPTS / benchmark.aspects[0].prompt_file))
            for benchmark in (GenEvalPP(), Note())
        )
        self.callers: dict[str, Caller] = {}

    @property
    def reason(self) -> BaseException | None:
        return self.stop.reason

    async def __aenter__(self) -> "RobustCalls":
        self._closing = ExitStack()
        try:
            self._shown = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
            append = self._closing.enter_context(JsonLines(self.out / SPENDING).appending())
            self._closing.enter_context(Interrupts(self.stop))
            rate = self.recipe.rate
            policy = Policy(rate.concurrency, rate.tries, 1, rate.first_wait, give_up_after=rate.give_up_after)
            cache = AnswerCache(self.out / ANSWERS)
            paces: dict[tuple, _Pace] = {}
            for role, model in self.models.items():
                gate, config = Gate(rate.concurrency, self.stop), getattr(self.recipe.models, role)
                if self.purse.budget is not None and role in ("image", "edit") and config.price.picture is None:
                    gate.limit = 1  # nobody knows yet what a picture costs that is billed by tokens
                account = self.purse.account(role, config.name, _usd_of(config), guess(role, config) or 0.0, gate)
                which = (getattr(model, "url", None), model.name)
                pace = paces.setdefault(which, _Pace(rate.per_minute if model.paid else None, self.stop))
                self.callers[role] = Caller(_Paced(model, pace), policy, gate, self.stop, account, append, cache)
            await self._check()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc) -> None:
        for model in self.models.values():
            await model.close()
        self._closing.close()

    async def _check(self) -> None:
        """Before anything is paid for: do the models exist, does the judge see?"""
        if self.recipe.models.check:
            endpoints = [model for model in self.models.values() if isinstance(model, OpenAIEndpoint)]
            for role, model in self.models.items():
                if model in endpoints and (known := (await missing_models([model])).get(model.name)) is not None:
                    raise ValueError(_no_such_model(role, model, known))
        judge = self.models.get("judge")
        if judge is not None and judge.paid and self.see:
            await look_at_probe(self.callers["judge"])
            if "http_404" in str(self.reason):
                raise ValueError(_no_such_model("judge", judge, [], str(self.reason)))
            if self.reason is not None:
                raise self.reason

    async def write(self, prompt: str, salt: str) -> str:
        answer = await self._ask("text", Question("", prompt, (), Correct), ["write", prompt, salt])
        if answer.refusal:
            raise Refused("text", answer.refusal)
        if answer.cut:
            raise Unreadable("the answer stopped at the length limit (models.text.max_tokens)")
        return answer.text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be stored

    async def draw(self, instruction: str, references: tuple[bytes, ...], seed: int, salt: str) -> bytes:
        role = "edit" if references and "edit" in self.models else "image"
        sends_seed = getattr(self.recipe.models, role).send_seed
        drawing = Drawing(instruction, references, seed if sends_seed else None)
        content = ["draw", instruction, [hashlib.sha256(data).hexdigest() for data in references], drawing.seed, salt]
        answer = await self._ask(role, drawing, content)
        if answer.refusal:
            raise Refused("image", answer.refusal)
        return picture_bytes(answer)

    async def judge(self, check: Check, picture: bytes, salt: str) -> Verdict:
        question, content = self._question(check, picture)
        _, words = self._structure if check.include else self._note
        for number in range(1, self.recipe.gates.answers + 1):
            answer = await self._ask("judge", question, [*content, salt, number])
            try:
                verdict = readings.read_verdict(answer, Correct)
            except readings.Unreadable as error:
                last = error
                continue
            return Verdict(bool(verdict.correct), verdict.reason, words.sha256)
        if last.kind == "refusal":
            raise Refused("judge", str(last))
        raise Unreadable(str(last))

    def _question(self, check: Check, picture: bytes) -> tuple[Question, list]:
        """The judge's question, and what makes it this one."""
        benchmark, words = self._structure if check.include else self._note
        facts = {"include": list(check.include), "exclude": []} if check.include else {"note": check.note}
        references = () if check.include else tuple(self._show(data).path for data in check.references)
        prompt = Prompt("1", "", check.instruction, facts=facts, references=references)
        shown = self._show(picture)
        question = words.ask(benchmark, benchmark.aspects[0], prompt, shown)
        seen = [entry.picture.sha256 for entry in question.shown]
        return question, ["judge", question.system, question.text, seen, facts]

    def _show(self, data: bytes) -> Picture:
        """Judges are shown files."""
        digest_ = hashlib.sha256(data).hexdigest()
        suffix = ".jpg" if data.startswith(b"\xff\xd8") else ".webp" if data.startswith(b"RIFF") else ".png"
        path = self._shown / (digest_ + suffix)
        if not path.exists():
            write_bytes(path, data)
        return Picture(path, digest_)

    def _identity(self, role: str) -> dict[str, Any]:
        if role not in self._identities:
            self._identities[role] = self.models[role].identity()
        return self._identities[role]

    async def _ask(self, role: str, question, content: list) -> Answer:
        """An answer, kept or paid for; what is asked twice at once is paid once."""
        caller = self.callers[role]
        key = digest([self._identity(role), *content])
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                self.stop.check()
                answer = await caller.ask(question, key, [])
                self._not_taken[role] = 0
                return answer
        except Stopped:
            raise Ended from None
        except BudgetReached as reached:
            self.stop.set(reached)
            raise Ended from None
        except JudgeFault as fault:
            raise self._after(role, fault) from None
        except Exception as error:
            self.stop.set(error)
            raise Ended from None
        finally:
            if not lock.locked():
                self._locks.pop(key, None)

    def _after(self, role: str, fault: JudgeFault) -> Exception:
        """What a call that brought no answer means for its row."""
        model = self.models[role]
        if _is_lost_model(fault):
            self.stop.reason = None  # what the caller says about it tells less
            self.stop.set(ValueError(_no_such_model(role, model, [], str(fault))))
        if self.stop.reason is not None:
            return Ended()
        if fault.retry:
            return Unanswered(f"{role}: {fault} ({fault.kind})")
        if is_moderation(_status(fault), fault.code, str(fault)):
            return Refused(role if role in ("text", "judge") else "image", str(fault))
        self._not_taken[role] += 1
        # Nothing of this kind ever worked, or nothing does any more: it is the request, not the row.
        if not self.purse.calls.get(role) or self._not_taken[role] >= self.recipe.rate.give_up_after:
            self.stop.set(ValueError(f"models.{role}: {model.name} does not take our request: {fault} ({fault.kind})"))
            return Ended()
        return Refused("endpoint", f"{role}: {fault} ({fault.kind})")


def _usd_of(config: Endpoint) -> Callable[[Answer], float]:
    """What an answer of the model costs; a refused picture costs its tokens at most."""
    return lambda answer: config.price.usd(answer.input_tokens, answer.output_tokens, 0 if answer.refusal else 1)


def _make_model(role: str, config: Any) -> Judge | OpenAIEndpoint:
    if config.is_local:
        return make_judge(config.name)
    of = {"url": config.url, "key_variable": config.key_variable, "timeout": config.timeout, "what": f"{role} model"}
    if isinstance(config, Image):
        return ImageModel(config.name, options={"size": config.size} | config.options, **of)
    return OpenAIJudge(
        config.name.removeprefix("openai:"), structured=role == "judge", temperature=config.temperature,
        max_tokens=config.max_tokens, **of | ({"what": "judge"} if role == "judge" else {}),
    )  # fmt: skip


def _require_prices(recipe: Recipe, roles: Sequence[str], budget: float | None) -> None:
    missing = [role for role in roles if guess(role, getattr(recipe.models, role)) is None]
    if budget is not None and missing:
        how = "{picture: USD}, or " if missing[0] in ("image", "edit") else ""
        raise ValueError(
            f"--budget needs to know what a call costs: say models.{missing[0]}.price in the recipe ({how}"
            "{input: USD, output: USD} per million tokens, from your provider's price list)"
        )


def _status(fault: JudgeFault) -> int | None:
    return int(fault.kind.removeprefix("http_")) if fault.kind.startswith("http_") else None


def _is_lost_model(fault: JudgeFault) -> bool:
    """Whether the server says that it has no such model, in whatever way; some say so with 400 or 403."""
    if fault.kind == "http_404" or fault.code == "model_not_found":
        return True
    said = str(fault).lower()
    return _status(fault) in (400, 403, 410) and "model" in said and any(words in said for words in _LOST)


def _no_such_model(role: str, model: OpenAIEndpoint, known: list[str], said: str = "") -> str:
    some = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    offers = f"it offers {some or 'none'}" if known or not said else f"it says: {said}"
    return (
        f"models.{role}: {public(model.url)} has no model {model.model!r}; {offers}. Models are retired: choose one that is "
        f"offered to you and set models.{role}.name in the recipe (models.check: false asks without looking first)"
    )
