"""A model that draws, asked as a judge is: the images endpoints of an OpenAI-compatible server."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo4o.evaluation.judges.base import Answer, JudgeFault
from echo4o.evaluation.judges.endpoint import OpenAIEndpoint, public

_MODERATION = ("moderation_blocked", "content_policy_violation", "content_filter")
_MODERATION_WORDS = ("safety system", "content policy", "content management policy", "content filter", "moderation")
_KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn. `references` are picture files as they are: with them the edit endpoint is asked."""

    instruction: str
    references: tuple[bytes, ...] = ()
    seed: int | None = None  # only for endpoints that know it


class ImageModel(OpenAIEndpoint):
    """Draws through `images.generate`, and through `images.edit` where there are references.

    Its answers hold the picture in base64, so that they are kept and counted like any other; a picture that the
    moderation blocks is an answer, too: a refusal.

    Args:
        options: what else the request holds (size, quality, output_format, ...), as the endpoint calls it.
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        options: Mapping[str, Any] | None = None,
        timeout: float = 300.0,
        what: str = "image model",
    ):
        super().__init__(model, url, key_variable, timeout, what)
        self.options = dict(options or {})

    def identity(self) -> dict[str, Any]:
        return {"model": self.model, "endpoint": public(self.url), "options": self.options}

    async def ask(self, question: Drawing, key: str) -> Answer:
        """One picture. Raises [`JudgeFault`]."""
        import openai

        try:
            response = await self._send(question, {"Idempotency-Key": key})
        except (openai.APIError, ValueError, TypeError) as error:
            if isinstance(error, openai.APIStatusError) and is_moderation(error.status_code, error.code, str(error)):
                return Answer("", refusal=self.told(error) or "blocked by the moderation")
            raise self.fault_of(error) from None
        first = next(iter(getattr(response, "data", None) or ()), None)
        picture = getattr(first, "b64_json", None)
        if not picture and getattr(first, "url", None):
            raise JudgeFault("bad_response", "it sent a link: set response_format: b64_json in the options")
        # No picture, or one that cannot be read, was paid for like any other: it is an answer.
        usage = getattr(response, "usage", None)
        return Answer(
            picture if isinstance(picture, str) else "",
            input_tokens=getattr(usage, "input_tokens", 0) or 0,
            output_tokens=getattr(usage, "output_tokens", 0) or 0,
        )

    async def _send(self, question: Drawing, headers: dict[str, str]):
        extra = {} if question.seed is None else {"seed": question.seed}
        request = {"model": self.model, "prompt": question.instruction, "n": 1, "extra_headers": headers}
        request["extra_body"] = self.options | extra
        images = self.connect().images
        if not question.references:
            return await images.generate(**request)
        files = [_named(number, data) for number, data in enumerate(question.references, start=1)]
        return await images.edit(image=files, **request)


def _named(number: int, data: bytes) -> tuple[str, bytes, str]:
    kind = next((kind for magic, kind in _KINDS if data.startswith(magic)), "png")
    return f"image_{number}.{kind}", data, f"image/{kind}"


def is_moderation(status: int | None, code: str | None, message: str) -> bool:
    """Whether a server's error means that the content was refused, not the request."""
    return code in _MODERATION or (
        status in (400, 403) and any(words in message.lower() for words in _MODERATION_WORDS)
    )


def picture_bytes(answer: Answer) -> bytes:
    """The picture of an answer, from plain, wrapped or `data:` base64; empty where there is none."""
    text = answer.text.partition("base64,")[2] if answer.text.startswith("data:") else answer.text
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters outside ASCII
        return b""


async def missing_models(models: list[OpenAIEndpoint]) -> dict[str, list[str]]:
    """Which models their endpoints do not list, with what those offer instead; costs nothing.

    An endpoint without a list of models is believed. Raises ValueError where the key or the address is wrong.
    """
    import openai

    offered: dict[str, list[str] | None] = {}
    missing = {}
    for model in models:
        if model.url not in offered:
            try:
                offered[model.url] = sorted([m.id async for m in model.connect().models.list()])
            except (openai.APIError, ValueError, TypeError, AttributeError) as error:
                fault = model.fault_of(error)
                if fault.kind in ("http_401", "http_403", "connection", "timeout"):
                    raise ValueError(f"{model.name} at {public(model.url)}: {fault} ({fault.kind})") from None
                offered[model.url] = None
        known = offered[model.url]
        if known is not None and model.model not in known:
            missing[model.name] = known
    return missing
