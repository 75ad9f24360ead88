"""The interface of a model that is called request by request, its answers and its faults."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelAnswer:
    """The answer of a model.

    Attributes:
        text: its text; for image endpoints the image in base64.
        refusal: why the model, or the moderation before it, declined; None where it answered.
        cut: whether it stopped at its length limit.
    """

    text: str
    refusal: str | None = None
    cut: bool = False
    input_tokens: int = 0
    output_tokens: int = 0


class CallFault(Exception):
    """A call without an answer.

    Args:
        kind: a short name for the record, such as "http_429".
        retry: whether the same call may succeed later.
        wait: seconds that the server asks to wait before the next try.
        fatal: whether no other call can succeed either (a wrong key, an unknown model).
        code: the server's own code, such as "model_not_found".
        refuses_content: whether a moderation refused the content of the request.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        retry: bool = False,
        wait: float | None = None,
        fatal: bool = False,
        code: str | None = None,
        refuses_content: bool = False,
    ):
        super().__init__(message)
        self.kind, self.retry, self.wait, self.fatal, self.code = kind, retry, wait, fatal, code
        self.refuses_content = refuses_content


class Endpoint(ABC):
    """A model that answers one request per call. A [`Caller`](calls.py) limits and repeats the calls.

    Attributes:
        name: as in records and messages, such as "openai:gpt-4.1-2025-04-14".
        parallel: the most calls that make sense at once; None: no limit.
        paid: whether answers cost money. Answers of paid endpoints are kept beyond the folder of one run.
    """

    name: str
    parallel: int | None = None
    paid = False

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything beside the request that answers depend on; part of results and of the keys of kept answers."""

    @abstractmethod
    async def ask(self, request: Any, key: str) -> ModelAnswer:
        """Answer one request. `key` identifies the call to the server. Raises [`CallFault`]."""

    def prepare(self) -> None:  # noqa: B027 - most endpoints have nothing to load
        """Load what is slow to load. Raises ValueError if the model cannot be used."""

    async def close(self) -> None:  # noqa: B027
        """Close connections."""
