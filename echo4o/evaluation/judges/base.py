"""What a judge is asked, and the interface that every judge implements."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

from echo4o.endpoints.chat_endpoint import ChatRequest
from echo4o.endpoints.endpoint import Answer, Endpoint
from echo4o.evaluation.benchmarks.base import Verdict


@dataclass(frozen=True, kw_only=True)
class Question(ChatRequest):
    """A question about one image.

    Attributes:
        images: the reference images where the judge sees them, then the image to grade.
        verdict: the fields of the answer.
        facts: the structure of the prompt, for judges that read it instead of the text.
    """

    verdict: type[Verdict]
    facts: dict[str, Any] = field(default_factory=dict)


class Judge(Endpoint):
    """A model that answers questions about images. The vision probe asks it a plain [`ChatRequest`]."""

    @abstractmethod
    async def ask(self, request: ChatRequest, key: str) -> Answer:
        """Answer one question. Raises [`CallFault`]."""
