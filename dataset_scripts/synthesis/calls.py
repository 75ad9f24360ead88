"""The interface through which the engine calls models for text, images and verdicts. Retries and costs are behind it."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ImageCheck:
    """A question to the judge about an image: a structure in the form of GenEval++, or a note in words."""

    instruction: str
    include: tuple[dict, ...] = ()
    note: str = ""
    references: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class ImageCheckResult:
    """The verdict of a judge."""

    right: bool
    reason: str
    prompt_sha256: str  # of the judge prompt


class ModelCalls(Protocol):
    """The models of a run. Equal requests with equal `salt` are paid for once.

    All raise [`CallRefused`], [`CallUnanswered`] or [`RunEnded`].
    """

    names: dict[str, str]  # role -> model, for the provenance of rows

    async def write(self, prompt: str, salt: str) -> str:
        """Returns the answer of the text model."""
        ...

    async def generate(self, instruction: str, references: tuple[bytes, ...], seed: int, salt: str) -> bytes:
        """Returns the file of a generated image."""
        ...

    async def judge(self, check: ImageCheck, image: bytes, salt: str) -> ImageCheckResult:
        """Returns the verdict of the judge."""
        ...


class CallRefused(Exception):
    """A model or its moderation refused the request. `by`: text, image, judge or endpoint."""

    def __init__(self, by: str, message: str):
        super().__init__(message)
        self.by = by


class UnusableAnswer(ValueError):
    """An answer does not have the requested form."""


class CallUnanswered(Exception):
    """A call got no answer; a later run repeats it."""


class RunEnded(Exception):
    """The run ends: it was interrupted, the budget is used up, or no call can succeed."""
