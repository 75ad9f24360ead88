"""`openai:MODEL`: OpenAI, or any server that speaks its protocol (vLLM, SGLang, llama.cpp, ...)."""

import base64
import os
import re
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit

from echo4o.evaluation.judges.base import Answer, Judge, JudgeFault, Question, json_schema

_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
RETRY_STATUS = {408, 409, 425, 429}
# What some servers say with a status that is otherwise about one request: no other request can succeed either.
_FATAL_CODES = {
    "model_not_found", "invalid_api_key", "insufficient_quota", "billing_hard_limit_reached", "billing_not_active",
    "account_deactivated",
}  # fmt: skip


class OpenAIEndpoint:
    """The connection to one model of an OpenAI-compatible server: its key, its faults, and nothing said with the key in it.

    Args:
        model: its name there.
        url: of the endpoint; None: OPENAI_BASE_URL, else OpenAI.
        key_variable: the environment variable that holds the key. The key itself is never an argument: arguments end
            in shell histories and process lists.
        timeout: seconds until a call counts as unanswered.
        what: what the model is used as, for messages.
    """

    paid = True
    parallel = None

    def __init__(self, model: str, url: str | None, key_variable: str, timeout: float, what: str = "judge"):
        self.model, self.name = model, f"openai:{model}"
        self.url = url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"the {what}'s URL must start with http:// or https://, it is {public(self.url)}")
        if urlsplit(self.url).username:
            raise ValueError(f"the {what}'s URL holds a user and password; the key belongs into {key_variable}")
        self._key = os.environ.get(key_variable, "")
        if not self._key:
            raise ValueError(
                f"the environment variable {key_variable} is not set: it holds the key of the {what} {self.name} at "
                f"{public(self.url)} (a server without keys takes any value: {key_variable}=none)"
            )
        if not (self._key.isascii() and self._key.isprintable() and " " not in self._key):
            # It would break the header, and the error about that would quote it.
            raise ValueError(
                f"the key in {key_variable} holds a character that no key has (a line break, a blank or a letter outside "
                "ASCII): copy it again"
            )
        self.timeout = timeout
        self._client = None

    def connect(self):
        import openai

        if self._client is None:
            # We repeat calls ourselves: what happened belongs into the record.
            self._client = openai.AsyncOpenAI(
                api_key=self._key, base_url=self.url, max_retries=0, timeout=self.timeout
            )
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def fault_of(self, error: Exception) -> JudgeFault:
        """What a failed call means: whether, when and why not to repeat it."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return self._fault_of_status(error)
        if isinstance(error, openai.APITimeoutError):
            return JudgeFault("timeout", f"no answer within {self.timeout:g} s", retry=True)
        if isinstance(error, openai.APIConnectionError):
            reason = self.redact(str(error.__cause__ or error))
            return JudgeFault("connection", f"{public(self.url)}: {reason}", retry=True)
        # 200 with a body that is no answer
        return JudgeFault("bad_response", self.redact(f"the response is broken: {error}"), retry=True)

    def _fault_of_status(self, error) -> JudgeFault:
        status, message = error.status_code, self.told(error)
        retry = status in RETRY_STATUS or status >= 500
        out_of_money = status == 429 and "insufficient_quota" in message
        fatal = status in (401, 402, 403, 404, 405) or error.code in _FATAL_CODES or out_of_money
        wait = wait_of(error.response.headers) if retry else None
        return JudgeFault(f"http_{status}", message, retry and not fatal, wait, fatal, error.code)

    def told(self, error) -> str:
        """The server's message in one line; cut when the key is out of it, so that no part of the key stays."""
        return self.redact(message_of(error))[:300]

    def redact(self, text: str) -> str:
        """Servers quote keys in what they say; nothing they say is kept with the key in it."""
        return text.replace(self._key, "[key]") if len(self._key) >= 6 else text


class OpenAIJudge(OpenAIEndpoint, Judge):
    """A judge behind an OpenAI-compatible endpoint; arguments as for [`OpenAIEndpoint`], and:

    Args:
        temperature: None leaves it to the endpoint (some models accept no other).
        structured: ask for structured outputs; switched off when the endpoint refuses them.
        detail: how closely the endpoint looks at pictures ("low", "high", "auto").
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
        device: str | None = None,
        what: str = "judge",
    ):
        super().__init__(model, url, key_variable, timeout, what)
        self.temperature, self.max_tokens, self.detail = temperature, max_tokens or 1024, detail
        self.structured, self.asks_structured = structured, structured

    def identity(self) -> dict[str, Any]:
        return {
            "judge": self.name,
            "endpoint": public(self.url),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "detail": self.detail,
            "structured": self.asks_structured,
        }

    async def ask(self, question: Question, key: str) -> Answer:
        import openai

        client = self.connect()
        structured = self.structured
        request = self._request(question, structured)
        try:
            response = await client.chat.completions.create(**request, extra_headers={"Idempotency-Key": key})
        except (openai.APIError, ValueError, TypeError) as error:
            refused = isinstance(error, openai.APIStatusError) and error.status_code in (400, 422)
            if structured and refused and _is_about_schema(str(error)):
                self.structured = False
                return await self.ask(question, f"{key}-plain")
            raise self.fault_of(error) from None
        return self._answer(response)

    def _request(self, question: Question, structured: bool) -> dict[str, Any]:
        content: list[dict] = []
        for shown in question.shown:
            path = shown.picture.path
            data = base64.b64encode(path.read_bytes()).decode()
            link = f"data:{_MIME[path.suffix.lower()]};base64,{data}"
            content.append({"type": "text", "text": f"{shown.label}:"})
            content.append({"type": "image_url", "image_url": {"url": link, "detail": self.detail}})
        content.append({"type": "text", "text": question.text})
        messages = [{"role": "system", "content": question.system}] if question.system else []
        request = {"model": self.model, "messages": [*messages, {"role": "user", "content": content}]}
        if self.temperature is not None:
            request["temperature"] = self.temperature
            request["max_tokens"] = self.max_tokens
        else:  # the models that take no temperature take no max_tokens either
            request["max_completion_tokens"] = self.max_tokens
        if structured:
            schema = {"name": "verdict", "strict": True, "schema": json_schema(question.verdict)}
            request["response_format"] = {"type": "json_schema", "json_schema": schema}
        return request

    def _answer(self, response) -> Answer:
        choices = getattr(response, "choices", None)
        if not choices or choices[0].message is None:
            raise JudgeFault("bad_response", "the response holds no answer", retry=True)
        choice, usage = choices[0], response.usage
        refusal = getattr(choice.message, "refusal", None)
        if choice.finish_reason == "content_filter":
            refusal = refusal or "stopped by the content filter"
        return Answer(
            text=self.redact(choice.message.content or ""),
            refusal=self.redact(refusal) if refusal else None,
            cut=choice.finish_reason == "length",
            input_tokens=getattr(usage, "prompt_tokens", 0) or 0,
            output_tokens=getattr(usage, "completion_tokens", 0) or 0,
        )


def public(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path.rstrip('/')}"


def message_of(error) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    said = body.get("message") or (body.get("error") or {}) or str(error)
    return " ".join(str(said).split())


def _is_about_schema(message: str) -> bool:
    return any(word in message for word in ("response_format", "json_schema", "structured", "guided", "grammar"))


def wait_of(headers) -> float | None:
    """Seconds that a server asks to wait: retry-after-ms, Retry-After (seconds or a date), or its rate limit's reset."""
    milliseconds = headers.get("retry-after-ms", "")
    if milliseconds.isdigit():
        return int(milliseconds) / 1000
    after = headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", after):
        return float(after)
    if after:
        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time())
        except (TypeError, ValueError):
            pass
    resets = [
        duration(headers[f"x-ratelimit-reset-{of}"])
        for of in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{of}") == "0" and f"x-ratelimit-reset-{of}" in headers
    ]
    return max((seconds for seconds in resets if seconds is not None), default=None)


def duration(text: str) -> float | None:
    """Seconds of "1m30s", "250ms" or "12"."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    return sum(float(number) * _UNIT[unit] for number, unit in parts) if parts else None
