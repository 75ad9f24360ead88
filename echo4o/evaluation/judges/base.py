"""What a judge is asked and what it answers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from echo4o.evaluation.benchmarks.base import Verdict
from echo4o.evaluation.pictures import Picture


@dataclass(frozen=True)
class Shown:
    """A picture with its place in the question."""

    label: str
    picture: Picture


@dataclass(frozen=True)
class Question:
    """Everything that one judgement rests on. `facts` is for judges that read structure instead of words."""

    system: str
    text: str
    shown: tuple[Shown, ...]
    verdict: type[Verdict]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back. `refusal`: the judge declined; `cut`: it stopped at its length limit."""

    text: str
    refusal: str | None = None
    cut: bool = False
    input_tokens: int = 0
    output_tokens: int = 0


class JudgeFault(Exception):
    """A call that brought no answer.

    Args:
        kind: a short name for the record, such as "http_429".
        retry: whether the same call may succeed later.
        wait: seconds that the server asked to wait for.
        fatal: no other call can succeed either (a wrong key, no such model).
        code: what the server itself calls it, such as "model_not_found".
    """

    def __init__(
        self,
        kind: str,
        message: str,
        retry: bool = False,
        wait: float | None = None,
        fatal: bool = False,
        code: str | None = None,
    ):
        super().__init__(message)
        self.kind, self.retry, self.wait, self.fatal, self.code = kind, retry, wait, fatal, code


class Judge(ABC):
    """Asked question by question; the caller bounds how many are open at once and repeats what can be repeated."""

    name: str
    # The most calls that make sense at once; None: as many as the caller wants.
    parallel: int | None = None
    # Whether answers cost money, so that they are kept beyond the folder of one run.
    paid = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the answers depend on beside the question; goes into the result and into the key of kept answers."""

    @abstractmethod
    async def ask(self, question: Question, key: str) -> Answer:
        """One call; `key` names it, so that a server can recognise the same call. Raises [`JudgeFault`]."""

    def prepare(self) -> None:  # noqa: B027 - most judges have nothing to load
        """Load what is slow to load; raises ValueError for what cannot work."""

    async def close(self) -> None:  # noqa: B027
        """Let go of connections."""


def answer_format(verdict: type[Verdict]) -> str:
    """One line that says what the answer has to look like."""
    fields = []
    for name, info in verdict.model_fields.items():
        kind = '"..."' if info.annotation is str else "0 or 1" if name == "correct" else "a number from 0 to 10"
        fields.append(f'"{name}": {kind}')
    return f"Answer with one JSON object and nothing else: {{{', '.join(fields)}}}"


def json_schema(verdict: type[Verdict]) -> dict[str, Any]:
    """The schema for structured outputs, in the plain subset that endpoints agree on; ranges are checked by us."""
    properties = {}
    for name, info in verdict.model_fields.items():
        kind = {"type": "string"} if info.annotation is str else {"type": "number"}
        properties[name] = {"type": "integer", "enum": [0, 1]} if name == "correct" else kind
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
