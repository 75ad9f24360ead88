"""Chat models behind an OpenAI-compatible endpoint: text and images in, text out."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from echo4o.common.image_metadata import image_sha256, without_metadata
from echo4o.endpoints.endpoint import ModelAnswer
from echo4o.endpoints.openai_connection import OpenAIEndpoint, public_url

_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}

# Reasons why an answer ended, in the words of OpenAI, Anthropic, Gemini and Mistral.
_CUT = {"length", "max_tokens", "max_output_tokens", "model_length"}
_FILTERED = {"content_filter", "safety", "refusal", "prohibited_content", "blocklist", "recitation"}


@dataclass(frozen=True)
class ImageFile:
    """An image file and the SHA-256 of its bytes without echo4o's metadata."""

    path: Path
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "ImageFile":
        return cls(path, image_sha256(path.read_bytes()))


def _as_seen(path: Path) -> tuple[bytes, str]:
    """The bytes to send of an image file, and their type.

    They are those of the file. An image that is turned by its EXIF data, transparent or of 16 bits is sent as an RGB
    PNG: models differ in what they do with such files.
    """
    from PIL import Image

    from echo4o.modeling.common.image_files import is_plain, to_rgb

    with Image.open(path) as image:
        if is_plain(image):
            return without_metadata(path.read_bytes()), _MIME[path.suffix.lower()]
        stream = io.BytesIO()
        to_rgb(image, str(path)).save(stream, "PNG")
        return stream.getvalue(), "image/png"


@dataclass(frozen=True)
class LabelledImage:
    """An image of a request, with the text that stands before it."""

    label: str
    image: ImageFile


@dataclass(frozen=True)
class ChatRequest:
    """One request to a chat model. With a `schema`, the answer is to be JSON of this schema.

    Attributes:
        make_body: makes the messages and settings to send instead of those that the endpoint makes of the other fields.
    """

    text: str
    system: str = ""
    images: tuple[LabelledImage, ...] = ()
    schema: dict[str, Any] | None = None
    make_body: Callable[[], dict[str, Any]] | None = None

    def estimate_tokens(self) -> int:
        """About how many input tokens it has: 4 letters each, images in tiles of 512 pixels as OpenAI counts them."""
        from PIL import Image

        total = (len(self.text) + len(self.system)) // 4
        for labelled in self.images:
            with Image.open(labelled.image.path) as image:
                width, height = image.size
            scale = min(1.0, 2048 / max(width, height))
            scale *= min(1.0, 768 / (min(width, height) * scale))
            tiles = -(-int(width * scale) // 512) * -(-int(height * scale) // 512)
            total += 85 + 170 * tiles
        return total


class ChatEndpoint(OpenAIEndpoint):
    """A chat model behind an OpenAI-compatible endpoint; answers a [`ChatRequest`].

    Args:
        model, url, key_variable, timeout, what: see [`OpenAIEndpoint`].
        temperature: None leaves it to the endpoint (some models accept no other).
        max_tokens: the length limit of an answer; None: 1024.
        structured: request structured outputs for requests with a schema, until the endpoint refuses them.
        detail: the resolution at which the endpoint reads images ("low", "high", "auto").
    """

    def __init__(
        self,
        model: str,
        url: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        temperature: float | None = 0.0,
        max_tokens: int | None = None,
        structured: bool = True,
        detail: str = "high",
        timeout: float = 120.0,
        what: str = "chat model",
    ):
        super().__init__(model, url, key_variable, timeout, what)
        self.temperature, self.max_tokens, self.detail = temperature, max_tokens or 1024, detail
        self.structured, self.asks_structured = structured, structured

    def identity(self) -> dict[str, Any]:
        # Answers that version 0.1 kept are found by a hash of this: names and values must stay.
        return {
            "judge": self.name,
            "endpoint": public_url(self.url),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "detail": self.detail,
            "structured": self.asks_structured,
        }

    async def ask(self, request: ChatRequest, key: str) -> ModelAnswer:
        """Answer a request. Raises [`CallFault`]."""
        import openai

        structured = self.structured and request.schema is not None
        try:
            response = await self._send(request, key, structured)
        except (openai.APIError, ValueError, TypeError) as error:
            is_status = isinstance(error, openai.APIStatusError)
            if structured and is_status and self.server_error(error).refuses_schema:
                return await self._ask_plainly(request, key)
            fault = self.fault_of(error)
            if fault.refuses_content:
                return ModelAnswer("", refusal=str(fault))
            raise fault from None
        return self._answer(response)

    async def _ask_plainly(self, request: ChatRequest, key: str) -> ModelAnswer:
        """Ask without structured output; where that is answered, no later call asks for it again."""
        answer = await ChatEndpoint.ask(self, replace(request, schema=None), f"{key}-plain")
        self.structured = False
        return answer

    async def _send(self, request: ChatRequest, key: str, structured: bool):
        body = self._body(request, structured)
        return await self.connect().chat.completions.create(**body, extra_headers=self.headers(key))

    def _body(self, request: ChatRequest, structured: bool) -> dict[str, Any]:
        if request.make_body is not None:
            return {"model": self.model, **request.make_body()}
        content: list[dict] = []
        for labelled in request.images:
            path = labelled.image.path
            data, kind = _as_seen(path)
            link = f"data:{kind};base64,{base64.b64encode(data).decode()}"
            content.append({"type": "text", "text": f"{labelled.label}:"})
            content.append({"type": "image_url", "image_url": {"url": link, "detail": self.detail}})
        content.append({"type": "text", "text": request.text})
        messages = [{"role": "system", "content": request.system}] if request.system else []
        body = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}]}
        if self.temperature is not None:
            body["temperature"] = self.temperature
            body["max_tokens"] = self.max_tokens
        else:  # models that do not accept a temperature do not accept max_tokens either
            body["max_completion_tokens"] = self.max_tokens
        if structured:
            schema = {"name": "verdict", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _answer(self, response: Any) -> ModelAnswer:
        choices = getattr(response, "choices", None)
        if not choices or choices[0].message is None:
            raise self.fault_in_answer(response)
        choice, usage = choices[0], getattr(response, "usage", None)
        finish = str(choice.finish_reason or "").lower()
        text, refusal = read_content(choice.message.content)
        refusal = getattr(choice.message, "refusal", None) or refusal
        if finish in _FILTERED:
            refusal = refusal or "stopped by the content filter"
        return ModelAnswer(
            text=self.redact(text),
            refusal=self.redact(refusal) if refusal else None,
            cut=finish in _CUT,
            input_tokens=getattr(usage, "prompt_tokens", 0) or 0,
            output_tokens=getattr(usage, "completion_tokens", 0) or 0,
        )


def read_content(content: Any) -> tuple[str, str | None]:
    """The text of a message and its refusal.

    Servers send text, a list of parts (of which the text parts count, not those of the reasoning), or JSON itself.
    """
    if content is None or isinstance(content, str):
        return content or "", None
    if isinstance(content, dict) and not isinstance(content.get("type"), str):
        return json.dumps(content), None
    texts, refusals = [], []
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in (None, "text", "output_text"):
            value = part.get("text")
            texts.append(str(value.get("value", "") if isinstance(value, dict) else value or ""))
        elif isinstance(part, dict) and part.get("type") == "refusal":
            refusals.append(str(part.get("refusal") or "refused"))
    return "".join(texts), " ".join(refusals) or None
