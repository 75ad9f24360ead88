"""What a judge is asked, and the interface that every judge implements."""

from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echo4o.endpoints.chat_endpoint import ChatRequest
from echo4o.endpoints.endpoint import Endpoint, ModelAnswer
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
    """A model that answers questions about images. The vision probe asks it a plain [`ChatRequest`].

    Attributes:
        needs_probe: whether to test first that the model sees images.
        benchmarks: the names of the only benchmarks that it can judge; None: it reads any question.
    """

    needs_probe = True
    benchmarks: tuple[str, ...] | None = None

    def keep_in(self, out: Path) -> None:  # noqa: B027 - most judges keep nothing beside the records
        """Keep intermediate results in the folder of the evaluation."""

    @abstractmethod
    async def ask(self, request: ChatRequest, key: str) -> ModelAnswer:
        """Answer one question. Raises [`CallFault`]."""
