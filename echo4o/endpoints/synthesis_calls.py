"""The calls of `echo4o dataset synthesize`: text, image and judge models within one budget, with kept answers."""

import asyncio
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from echo4o.common.model_text import without_reasoning
from echo4o.dataset_scripts.synthesis.calls import (
    CallRefused,
    CallUnanswered,
    ImageCheck,
    ImageCheckResult,
    RunEnded,
    UnusableAnswer,
)
from echo4o.dataset_scripts.synthesis.folder import ANSWERS, SPENDING
from echo4o.dataset_scripts.synthesis.plan import guess
from echo4o.dataset_scripts.synthesis.recipe import ImageModelSettings, JudgeSettings, ModelSettings, SynthesisRecipe
from echo4o.endpoints.budget import BudgetReached, Ledger
from echo4o.endpoints.cache import AnswerCache, request_key
from echo4o.endpoints.calls import Caller
from echo4o.endpoints.chat_endpoint import ChatEndpoint, ChatRequest, ImageFile
from echo4o.endpoints.endpoint import CallFault, Endpoint, ModelAnswer
from echo4o.endpoints.image_endpoint import ImageEndpoint, ImageRequest, holds_image, image_bytes
from echo4o.endpoints.json_answers import UnreadableAnswer
from echo4o.endpoints.limits import CallPolicy, ConcurrencyLimit, InterruptHandler, RateLimit, Stopped, StopSignal
from echo4o.endpoints.openai_connection import OpenAIEndpoint, missing_models, public_url
from echo4o.endpoints.vision_probe import probe_vision

_LOST = (
    "does not exist",
    "not exist or",
    "deprecated",
    "shut down",
    "retired",
    "decommissioned",
    "no longer available",
)


class ImageChecker(Protocol):
    """How the judge of a recipe is asked about an image; see `echo4o.evaluation.image_checks`."""

    @property
    def endpoint(self) -> Endpoint:
        """The model that answers."""
        ...

    def question(
        self, check: ImageCheck, image: ImageFile, references: Sequence[ImageFile]
    ) -> tuple[ChatRequest, dict[str, Any]]:
        """The request to the judge, and the facts that it rests on."""
        ...

    def read(self, check: ImageCheck, answer: ModelAnswer) -> ImageCheckResult:
        """The verdict in an answer. Raises [`UnreadableAnswer`]."""
        ...


class SynthesisCalls:
    """The models of a recipe, as an async context manager. Afterwards `reason` holds what ended the run early, if anything.

    Args:
        out: the folder of the synthesis, which keeps answers and costs.
        roles: the models that its rows need (text, image, edit, judge).
        make_checker: makes the judge of the recipe's `models.judge`.
        budget: USD that the folder may cost in all.
        probe: whether the judge is shown a test image first.

    Raises:
        ValueError: a key is not set, or the budget is used up or lacks a price.
    """

    def __init__(
        self,
        recipe: SynthesisRecipe,
        out: Path,
        roles: Sequence[str],
        make_checker: Callable[[JudgeSettings], ImageChecker],
        budget: float | None = None,
        probe: bool = True,
    ):
        self.recipe, self.out, self.probe = recipe, out, probe
        self.stop = StopSignal()
        self._locks: dict[str, asyncio.Lock] = {}
        self._identities: dict[str, dict[str, Any]] = {}
        self._refused_in_a_row: Counter[str] = Counter()
        self.checker: ImageChecker | None = None
        self.models: dict[str, Endpoint] = {}
        for role in roles:
            config = getattr(recipe.models, role)
            if role == "judge":
                self.checker = make_checker(config)
                self.models[role] = self.checker.endpoint
            else:
                self.models[role] = _make_model(role, config)
        _require_prices(recipe, roles, budget)
        self.ledger = Ledger(out / SPENDING, budget)
        spent = self.ledger.spent or 0.0
        if budget is not None and spent >= budget:
            raise BudgetReached(
                f"the budget is {budget:g} USD and {spent:.4f} are spent: no call can be made; give a higher --budget"
            )
        self.names = {role: model.name.removeprefix("openai:") for role, model in self.models.items()}
        self.callers: dict[str, Caller] = {}

    @property
    def reason(self) -> BaseException | None:
        """What ended the run early."""
        return self.stop.reason

    async def __aenter__(self) -> "SynthesisCalls":
        self._closing = ExitStack()
        try:
            self._judged_images = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
            self._closing.enter_context(self.ledger)
            self._closing.enter_context(InterruptHandler(self.stop))
            self._make_callers()
            await self._require_models()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc) -> None:
        for model in self.models.values():
            await model.close()
        self._closing.close()

    def _make_callers(self) -> None:
        rate, cache = self.recipe.rate, AnswerCache(self.out / ANSWERS)
        policy = CallPolicy(rate.concurrency, rate.tries, 1, rate.first_wait, give_up_after=rate.give_up_after)
        rates: dict[tuple, RateLimit] = {}  # roles that share a model share its calls per minute
        for role, model in self.models.items():
            limit, config = ConcurrencyLimit(rate.concurrency, self.stop), getattr(self.recipe.models, role)
            if self.ledger.budget is not None and role in ("image", "edit") and config.price.picture is None:
                limit.limit = 1  # the cost of an image that is billed by tokens is unknown before the first one
            account = self.ledger.account(role, config.name, limit, _usd_of(config), guess(role, config) or 0.0)
            which = (getattr(model, "url", None), model.name)
            per_model = rates.setdefault(which, RateLimit(rate.per_minute if model.paid else None, self.stop))
            self.callers[role] = Caller(model, policy, limit, self.stop, account, cache, rate=per_model)

    async def _require_models(self) -> None:
        """Before anything is paid for, require that the models exist and that the judge sees."""
        if self.recipe.models.check:
            for role, model in self.models.items():
                if isinstance(model, OpenAIEndpoint):
                    offered = (await missing_models([model])).get(model.name)
                    if offered is not None:
                        raise ValueError(_no_such_model(role, model, offered))
        judge = self.models.get("judge")
        if judge is not None and judge.paid and self.probe:
            await probe_vision(self.callers["judge"])
            if "http_404" in str(self.reason):
                raise ValueError(_no_such_model("judge", judge, [], str(self.reason)))
            if self.reason is not None:
                raise self.reason

    async def write(self, prompt: str, salt: str) -> str:
        """The text model's answer to a prompt."""
        answer = await self._ask("text", ChatRequest(prompt), ["write", prompt, salt], _is_usable_text)
        if answer.refusal:
            raise CallRefused("text", answer.refusal)
        if answer.cut:
            raise UnusableAnswer("the answer stopped at the length limit (models.text.max_tokens)")
        text = without_reasoning(answer.text)
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be stored

    async def generate(self, instruction: str, references: tuple[bytes, ...], seed: int, salt: str) -> bytes:
        """Generates the image of an instruction; with references, by the edit model if one is configured."""
        role = "edit" if references and "edit" in self.models else "image"
        sends_seed = getattr(self.recipe.models, role).send_seed
        request = ImageRequest(instruction, references, seed if sends_seed else None)
        content = ["draw", instruction, [hashlib.sha256(data).hexdigest() for data in references], request.seed, salt]
        answer = await self._ask(role, request, content, _is_usable_image)
        if answer.refusal:
            raise CallRefused("image", answer.refusal)
        return image_bytes(answer)

    async def judge(self, check: ImageCheck, image: bytes, salt: str) -> ImageCheckResult:
        """The judge's verdict on an image; asks again, up to `gates.answers` times, if an answer is unreadable."""
        checker = self.checker
        if checker is None:
            raise RuntimeError("there is no judge among the roles of this synthesis")
        references = () if check.include else tuple(self._image_file(data) for data in check.references)
        request, facts = checker.question(check, self._image_file(image), references)
        hashes = [labelled.image.sha256 for labelled in request.images]
        content = ["judge", request.system, request.text, hashes, facts, salt]

        def is_verdict(answer: ModelAnswer) -> bool:
            try:
                checker.read(check, answer)
            except UnreadableAnswer:
                return False
            return True

        last = UnreadableAnswer("empty", "the judge was not asked")
        for number in range(1, self.recipe.gates.answers + 1):
            answer = await self._ask("judge", request, [*content, number], is_verdict)
            try:
                return checker.read(check, answer)
            except UnreadableAnswer as error:
                last = error
        if last.kind == "refusal":
            raise CallRefused("judge", str(last))
        raise UnusableAnswer(str(last))

    def _image_file(self, data: bytes) -> ImageFile:
        """The image as a file, which judges read."""
        sha256 = hashlib.sha256(data).hexdigest()
        suffix = ".jpg" if data.startswith(b"\xff\xd8") else ".webp" if data.startswith(b"RIFF") else ".png"
        path = self._judged_images / (sha256 + suffix)
        if not path.exists():
            path.write_bytes(data)
        return ImageFile(path, sha256)

    def _identity(self, role: str) -> dict[str, Any]:
        if role not in self._identities:
            self._identities[role] = self.models[role].identity()
        return self._identities[role]

    async def _ask(
        self, role: str, request: Any, content: list, is_usable: Callable[[ModelAnswer], bool]
    ) -> ModelAnswer:
        """An answer, kept or paid for; two equal requests at the same time are paid for once."""
        key = request_key([self._identity(role), *content])
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                self.stop.check()
                answer = await self.callers[role].ask(request, key, [], is_usable)
                self._refused_in_a_row[role] = 0
                return answer
        except Stopped:
            raise RunEnded from None
        except BudgetReached as reached:
            self.stop.set(reached)
            raise RunEnded from None
        except CallFault as fault:
            raise self._error_of(role, fault) from None
        except Exception as error:
            self.stop.set(error)
            raise RunEnded from None
        finally:
            if not lock.locked():
                self._locks.pop(key, None)

    def _error_of(self, role: str, fault: CallFault) -> Exception:
        """The error for the row whose call failed; stops the run where it is not the row's fault."""
        model = self.models[role]
        if _is_lost_model(fault):
            self.stop.reason = None  # this message says more than the caller's
            self.stop.set(ValueError(_no_such_model(role, model, [], str(fault))))
        if self.stop.reason is not None:
            return RunEnded()
        if fault.retry:
            return CallUnanswered(f"{role}: {fault} ({fault.kind})")
        if fault.refuses_content:
            return CallRefused(role if role in ("text", "judge") else "image", str(fault))
        self._refused_in_a_row[role] += 1
        # The first request of its kind, or several in a row, refused: the fault is in the request, not in the row.
        never_worked = not self.ledger.calls_by_role.get(role)
        if never_worked or self._refused_in_a_row[role] >= self.recipe.rate.give_up_after:
            self.stop.set(
                ValueError(f"models.{role}: {model.name} does not accept our request: {fault} ({fault.kind})")
            )
            return RunEnded()
        return CallRefused("endpoint", f"{role}: {fault} ({fault.kind})")


def _usd_of(config: ModelSettings) -> Callable[[ModelAnswer], float]:
    """The cost of an answer; a refused image costs its tokens at most."""
    return lambda answer: config.price.usd(answer.input_tokens, answer.output_tokens, 0 if answer.refusal else 1)


def _is_usable_text(answer: ModelAnswer) -> bool:
    return bool(answer.refusal) or bool(without_reasoning(answer.text).strip() and not answer.cut)


def _is_usable_image(answer: ModelAnswer) -> bool:
    return bool(answer.refusal) or holds_image(answer)


def _make_model(role: str, config: Any) -> OpenAIEndpoint:
    options = {
        "url": config.url, "key_variable": config.key_variable, "timeout": config.timeout, "what": f"{role} model"
    }  # fmt: skip
    if isinstance(config, ImageModelSettings):
        return ImageEndpoint(config.name, options={"size": config.size} | config.options, **options)
    return ChatEndpoint(
        config.name.removeprefix("openai:"),
        structured=False,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        **options,
    )


def _require_prices(recipe: SynthesisRecipe, roles: Sequence[str], budget: float | None) -> None:
    missing = [role for role in roles if guess(role, getattr(recipe.models, role)) is None]
    if budget is not None and missing:
        how = "{picture: USD}, or " if missing[0] in ("image", "edit") else ""
        raise ValueError(
            f"--budget needs the cost of a call: set models.{missing[0]}.price in the recipe ({how}"
            "{input: USD, output: USD} per million tokens, from your provider's price list)"
        )


def _status(fault: CallFault) -> int | None:
    return int(fault.kind.removeprefix("http_")) if fault.kind.startswith("http_") else None


def _is_lost_model(fault: CallFault) -> bool:
    """Whether the server says that it does not have the model; some say so with 400 or 403."""
    if fault.kind == "http_404" or fault.code == "model_not_found":
        return True
    message = str(fault).lower()
    return _status(fault) in (400, 403, 410) and "model" in message and any(words in message for words in _LOST)


def _no_such_model(role: str, model: Endpoint, known: list[str], message: str = "") -> str:
    some = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
    offers = f"it offers {some or 'none'}" if known or not message else f"it says: {message}"
    where = public_url(model.url) if isinstance(model, OpenAIEndpoint) else "this machine"
    name = model.model if isinstance(model, OpenAIEndpoint) else model.name
    return (
        f"models.{role}: {where} has no model {name!r}; {offers}. Models are retired: choose one that is "
        f"offered to you and set models.{role}.name in the recipe (models.check: false asks without looking first)"
    )
