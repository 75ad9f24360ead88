"""The calls of `echo4o dataset synthesize`: the evaluation's patience, kept answers and judges, for models that write and draw."""

import asyncio
import base64
import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic
from typing import Any

from echo4o.dataset_scripts.synthesis.calls import Check, Ended, Refused, Unanswered, Unreadable, Verdict
from echo4o.dataset_scripts.synthesis.folder import ANSWERS, SPENDING
from echo4o.dataset_scripts.synthesis.plan import guess
from echo4o.dataset_scripts.synthesis.recipe import Endpoint, Recipe
from echo4o.evaluation.benchmarks.base import PROMPTS, Aspect, Benchmark, Prompt
from echo4o.evaluation.benchmarks.genevalpp import Correct, GenEvalPP
from echo4o.evaluation.calls import AnswerCache, BudgetReached, Caller, Gate, Interrupts, Policy, Stop, Stopped
from echo4o.evaluation.folder import Records
from echo4o.evaluation.image_endpoint import Drawing, ImageModel, missing_models, tells_of_moderation
from echo4o.evaluation.judge import digest
from echo4o.evaluation.judges import Answer, Judge, JudgeFault, Question, make_judge
from echo4o.evaluation.judges import reading as readings
from echo4o.evaluation.judges.endpoint import OpenAIEndpoint, OpenAIJudge, public
from echo4o.evaluation.pictures import Picture
from echo4o.evaluation.probe import look_at_probe
from echo4o.evaluation.purse import Price, Purse
from echo4o.evaluation.questions import JudgePrompt


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


class _Paced:
    """A model that is asked at most so many times a minute."""

    def __init__(self, model, per_minute: int | None, stop: Stop):
        self.model, self.name, self.paid = model, model.name, model.paid
        self.identity, self.close = model.identity, model.close
        self._every, self._stop, self._next = 60.0 / per_minute if per_minute else 0.0, stop, 0.0

    async def ask(self, question, key: str) -> Answer:
        if self._every:
            now = monotonic()
            turn, self._next = max(now, self._next), max(now, self._next) + self._every
            if turn > now:
                await self._stop.sleep(turn - now)
        return await self.model.ask(question, key)


class RobustCalls:
    """The models of a recipe, in an `async with`; afterwards `reason` says what ended the run, if anything did.

    Args:
        out: the folder of the synthesis: answers and costs are kept there.
        budget: USD that the folder may cost in all.
        see: whether the judge is shown a test picture first.

    Raises:
        ValueError: a key that is not set, a budget without prices or of nothing.
    """

    def __init__(self, recipe: Recipe, out: Path, budget: float | None = None, see: bool = True):
        self.recipe, self.out, self.see = recipe, out, see
        self.stop, self._locks, self._identities = Stop(), {}, {}
        self.models = _make_models(recipe)
        _require_prices(recipe, self.models, budget)
        self.purse = Purse(out / SPENDING, budget)
        if budget is not None and self.purse.spent >= budget:
            raise BudgetReached(
                f"the budget is {budget:.2f} USD and {self.purse.spent:.4f} are spent: nothing can be asked; give a higher "
                "--budget"
            )
        self.names = {role: model.name.removeprefix("openai:") for role, model in self.models.items()}
        self._questions = {
            benchmark.name: (benchmark, JudgePrompt.read(PROMPTS / benchmark.aspects[0].prompt_file))
            for benchmark in (GenEvalPP(), Note())
        }
        self.callers: dict[str, Caller] = {}

    @property
    def reason(self) -> BaseException | None:
        return self.stop.reason

    async def __aenter__(self) -> "RobustCalls":
        self._closing = ExitStack()
        try:
            self._shown = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
            append = self._closing.enter_context(Records(self.out / SPENDING).appending())
            self._closing.enter_context(Interrupts(self.stop))
            rate = self.recipe.rate
            policy = Policy(rate.concurrency, rate.tries, 1, rate.first_wait, give_up_after=rate.give_up_after)
            cache = AnswerCache(self.out / ANSWERS)
            for role, model in self.models.items():
                gate, config = Gate(rate.concurrency, self.stop), _config(self.recipe, role)
                price = Price(config.price.picture, config.price.input, config.price.output)
                account = self.purse.account(role, config.name, price, guess(role, config) or 0.0, gate)
                paced = _Paced(model, rate.per_minute, self.stop)
                self.callers[role] = Caller(paced, policy, gate, self.stop, account, append, cache)
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
            if self.reason is not None:
                raise self.reason

    async def write(self, prompt: str, salt: str) -> str:
        answer = await self._ask("text", Question("", prompt, (), Correct), ["write", prompt, salt])
        if answer.refusal:
            raise Refused("text", answer.refusal)
        if answer.cut:
            raise Unreadable("the answer stopped at the length limit (models.text.max_tokens)")
        return answer.text

    async def draw(self, instruction: str, references: tuple[bytes, ...], seed: int, salt: str) -> bytes:
        role = "edit" if references and "edit" in self.models else "image"
        sends_seed = _config(self.recipe, role).send_seed
        drawing = Drawing(instruction, references, seed if sends_seed else None)
        content = ["draw", instruction, [hashlib.sha256(data).hexdigest() for data in references], drawing.seed, salt]
        answer = await self._ask(role, drawing, content)
        if answer.refusal:
            raise Refused("image", answer.refusal)
        return base64.b64decode(answer.text)

    async def judge(self, check: Check, picture: bytes, salt: str) -> Verdict:
        question, content = self._question(check, picture)
        for number in range(1, self.recipe.gates.answers + 1):
            answer = await self._ask("judge", question, [*content, salt, number])
            try:
                verdict = readings.read_verdict(answer, Correct)
            except readings.Unreadable as error:
                last = error
                continue
            return Verdict(bool(verdict.correct), verdict.reason)
        if last.kind == "refusal":
            raise Refused("judge", str(last))
        raise Unreadable(str(last))

    def _question(self, check: Check, picture: bytes) -> tuple[Question, list]:
        """The judge's question, and what makes it this one."""
        benchmark, words = self._questions["genevalpp" if check.include else "synthesis_note"]
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
            path.write_bytes(data)
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
                return await caller.ask(question, key, [])
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
        if fault.kind == "http_404":
            self.stop.reason = ValueError(_no_such_model(role, model, [], str(fault)))
        if self.stop.reason is not None:
            return Ended()
        if fault.retry:
            return Unanswered(f"{role}: {fault} ({fault.kind})")
        if tells_of_moderation(str(fault)):
            return Refused(role if role in ("text", "judge") else "image", str(fault))
        if not self.purse.calls.get(role):  # nothing of this kind ever worked: it is the request, not the row
            self.stop.set(ValueError(f"models.{role}: {model.name} does not take our request: {fault} ({fault.kind})"))
            return Ended()
        return Refused("endpoint", f"{role}: {fault} ({fault.kind})")


def _config(recipe: Recipe, role: str) -> Any:
    return getattr(recipe.models, role)


def _make_models(recipe: Recipe) -> dict[str, Judge | OpenAIEndpoint]:
    """The models that the recipe's rows need, by role."""
    models, made = recipe.models, {}
    of = {"url": models.text.url, "key_variable": models.text.key_variable, "timeout": models.text.timeout}
    made["text"] = OpenAIJudge(
        models.text.name, structured=False, temperature=models.text.temperature,
        max_tokens=models.text.max_tokens, what="text model", **of,
    )  # fmt: skip
    for role in ("image", "edit"):
        if config := getattr(models, role):
            options = {"size": config.size} | config.options
            made[role] = ImageModel(
                config.name, config.url, config.key_variable, options, config.timeout, f"{role} model"
            )
    if recipe.gates.verify:
        made["judge"] = _make_judge(models.judge)
    return made


def _make_judge(config: Endpoint) -> Judge:
    if config.name == "pixels" or config.name.startswith("hf:"):
        return make_judge(config.name)
    name = f"openai:{config.name.removeprefix('openai:')}"
    return make_judge(name, url=config.url, key_variable=config.key_variable, timeout=config.timeout)


def _require_prices(recipe: Recipe, roles: Sequence[str], budget: float | None) -> None:
    if budget is None:
        return
    if budget <= 0:
        raise ValueError(f"--budget {budget:g} buys nothing: give USD, for example --budget 5")
    missing = [role for role in roles if guess(role, _config(recipe, role)) is None]
    if missing:
        raise ValueError(
            f"--budget needs to know what a call costs: say models.{missing[0]}.price in the recipe ({{picture: 0.01}}, or "
            "{input: 0.4, output: 1.6} per million tokens)"
        )


def _no_such_model(role: str, model: OpenAIEndpoint, known: list[str], said: str = "") -> str:
    some = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    offers = f"it offers {some or 'none'}" if known or not said else f"it says: {said}"
    return (
        f"models.{role}: {public(model.url)} has no model {model.model!r}; {offers}. Models are retired: choose one that is "
        f"offered to you and set models.{role}.name in the recipe (models.check: false asks without looking first)"
    )
