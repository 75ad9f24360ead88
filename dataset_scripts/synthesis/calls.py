"""What the engine asks of the outside: words, pictures and verdicts. Who answers, retries and counts is not its matter."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ImageCheck:
    """What a judge is asked about a picture: a structure as GenEval++ has it, or else a note in words."""

    instruction: str
    include: tuple[dict, ...] = ()
    note: str = ""
    references: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class ImageCheckResult:
    """A judge's answer."""

    right: bool
    reason: str
    prompt_sha256: str  # of the words that the judge was asked with


class ModelCalls(Protocol):
    """The models of a run. `salt` tells apart what may be asked twice; an equal question is paid for once.

    All raise [`CallRefused`], [`CallUnanswered`] or [`RunEnded`].
    """

    names: dict[str, str]  # role -> model, for the provenance

    async def write(self, prompt: str, salt: str) -> str: ...

    async def draw(self, instruction: str, references: tuple[bytes, ...], seed: int, salt: str) -> bytes: ...

    async def judge(self, check: ImageCheck, picture: bytes, salt: str) -> ImageCheckResult: ...


class CallRefused(Exception):
    """The model, or the moderation before it, declined."""

    def __init__(self, by: str, message: str):
        super().__init__(message)
        self.by = by


class UnusableAnswer(ValueError):
    """An answer came, and it is not what was asked for."""


class CallUnanswered(Exception):
    """No answer came; a later run asks again."""


class RunEnded(Exception):
    """The run is over: interrupted, out of budget, or nothing can succeed any more."""
