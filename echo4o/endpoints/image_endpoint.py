"""Image models behind the images endpoints of an OpenAI-compatible server."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from echo4o.endpoints.endpoint import CallFault, ModelAnswer
from echo4o.endpoints.openai_connection import OpenAIEndpoint, public_url

_KINDS = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class ImageRequest:
    """One image to generate.

    Args:
        references: reference images as files; with them, the edit endpoint is called.
        seed: only for endpoints that accept one.
    """

    instruction: str
    references: tuple[bytes, ...] = ()
    seed: int | None = None


class ImageEndpoint(OpenAIEndpoint):
    """Generates images through `images.generate`, and through `images.edit` for requests with references.

    The answer holds the image in base64 (see [`image_bytes`]). An image that the moderation blocks is an answer with a
    refusal.

    Args:
        model, url, key_variable, timeout, what: see [`OpenAIEndpoint`].
        options: further fields of the request (size, quality, output_format, ...), in the endpoint's own names.
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
        return {"model": self.model, "endpoint": public_url(self.url), "options": self.options}

    async def ask(self, request: ImageRequest, key: str) -> ModelAnswer:
        """Generate one image. Raises [`CallFault`]."""
        import openai

        try:
            response = await self._send(request, self.headers(key))
        except (openai.APIError, ValueError, TypeError) as error:
            fault = self.fault_of(error)
            if fault.refuses_content:
                return ModelAnswer("", refusal=str(fault))
            raise fault from None
        if isinstance(response, str) or "error" in (getattr(response, "model_extra", None) or {}):
            raise self.fault_in_answer(response)
        first = next(iter(getattr(response, "data", None) or ()), None)
        image = getattr(first, "b64_json", None)
        if not image and getattr(first, "url", None):
            raise CallFault("bad_response", "it sent a link: set response_format: b64_json in the options")
        # A missing or unreadable image was paid for like any other: it is an answer.
        usage = getattr(response, "usage", None)
        return ModelAnswer(
            image if isinstance(image, str) else "",
            input_tokens=getattr(usage, "input_tokens", 0) or 0,
            output_tokens=getattr(usage, "output_tokens", 0) or 0,
        )

    async def _send(self, request: ImageRequest, headers: dict[str, Any]):
        seed = {} if request.seed is None else {"seed": request.seed}
        body = {"model": self.model, "prompt": request.instruction, "n": 1, "extra_headers": headers}
        body["extra_body"] = self.options | seed
        images = self.connect().images
        if not request.references:
            return await images.generate(**body)
        files = [_as_upload(number, data) for number, data in enumerate(request.references, start=1)]
        return await images.edit(image=files, **body)


def _as_upload(number: int, data: bytes) -> tuple[str, bytes, str]:
    kind = next((kind for magic, kind in _KINDS if data.startswith(magic)), "png")
    return f"image_{number}.{kind}", data, f"image/{kind}"


def image_bytes(answer: ModelAnswer) -> bytes:
    """The image of an answer, from plain, wrapped or `data:` base64; empty where there is none."""
    text = answer.text.partition("base64,")[2] if answer.text.startswith("data:") else answer.text
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters outside ASCII
        return b""


def holds_image(answer: ModelAnswer) -> bool:
    """Whether an answer holds an image that can be decoded."""
    from echo4o.modeling.common.image_files import open_image

    try:
        open_image(image_bytes(answer))
    except Exception:  # whatever a decoder of arbitrary bytes runs into
        return False
    return True
