"""The connection to an OpenAI-compatible server (OpenAI, vLLM, SGLang, llama.cpp, ...): key, faults, requested waits."""

import os
import re
from email.utils import parsedate_to_datetime
from time import time
from urllib.parse import urlsplit

from echo4o.endpoints.endpoint import CallFault, Endpoint

_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
RETRY_STATUS = {408, 409, 425, 429}
# Codes after which no other request can succeed either, although some servers send them with a passing status.
_FATAL_CODES = {
    "model_not_found", "invalid_api_key", "insufficient_quota", "billing_hard_limit_reached", "billing_not_active",
    "account_deactivated",
}  # fmt: skip


class OpenAIEndpoint(Endpoint):
    """The connection to one model of an OpenAI-compatible server. Keys are removed from everything that the server says.

    Args:
        model: the name of the model at the server.
        url: the address of the endpoint; None: OPENAI_BASE_URL, else OpenAI.
        key_variable: the environment variable that holds the key. The key itself is never an argument: arguments end
            in shell histories and process lists.
        timeout: seconds until a call counts as unanswered.
        what: the use of the model, for messages.
    """

    paid = True

    def __init__(self, model: str, url: str | None, key_variable: str, timeout: float, what: str = "judge"):
        self.model, self.name = model, f"openai:{model}"
        self.url = url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"the {what}'s URL must start with http:// or https://, it is {public_url(self.url)}")
        if urlsplit(self.url).username:
            raise ValueError(f"the {what}'s URL holds a user and password; the key belongs into {key_variable}")
        self._key = os.environ.get(key_variable, "")
        if not self._key:
            raise ValueError(
                f"the environment variable {key_variable} is not set: it holds the key of the {what} {self.name} at "
                f"{public_url(self.url)} (a server without keys takes any value: {key_variable}=none)"
            )
        if not (self._key.isascii() and self._key.isprintable() and " " not in self._key):
            # It would break the header, and the error would quote it.
            raise ValueError(
                f"the key in {key_variable} holds a character that keys do not have (a line break, a blank or a letter "
                "outside ASCII): copy it again"
            )
        self.timeout = timeout
        self._client = None

    def connect(self):
        """The client, which is made once."""
        import openai

        if self._client is None:
            # Calls are repeated by our Caller, which records every fault.
            self._client = openai.AsyncOpenAI(
                api_key=self._key, base_url=self.url, max_retries=0, timeout=self.timeout
            )
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def fault_of(self, error: Exception) -> CallFault:
        """The fault of a failed call: whether and when to repeat it."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return self._fault_of_status(error)
        if isinstance(error, openai.APITimeoutError):
            return CallFault("timeout", f"no answer within {self.timeout:g} s", retry=True)
        if isinstance(error, openai.APIConnectionError):
            reason = self.redact(str(error.__cause__ or error))
            return CallFault("connection", f"{public_url(self.url)}: {reason}", retry=True)
        # 200 with a body that is not an answer
        return CallFault("bad_response", self.redact(f"the response is broken: {error}"), retry=True)

    def _fault_of_status(self, error) -> CallFault:
        status, message = error.status_code, self.message_of(error)
        retry = status in RETRY_STATUS or status >= 500
        out_of_money = status == 429 and "insufficient_quota" in message
        fatal = status in (401, 402, 403, 404, 405) or error.code in _FATAL_CODES or out_of_money
        wait = wait_of(error.response.headers) if retry else None
        return CallFault(f"http_{status}", message, retry and not fatal, wait, fatal, error.code)

    def message_of(self, error) -> str:
        """The server's message in one line. It is cut after the key was removed, so that no part of the key stays."""
        return self.redact(_message_of(error))[:300]

    def redact(self, text: str) -> str:
        """The text without the key, which servers quote in their messages."""
        return text.replace(self._key, "[key]") if len(self._key) >= 6 else text


def public_url(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path.rstrip('/')}"


def _message_of(error) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    message = body.get("message") or (body.get("error") or {}) or str(error)
    return " ".join(str(message).split())


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
        duration(headers[f"x-ratelimit-reset-{unit}"])
        for unit in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{unit}") == "0" and f"x-ratelimit-reset-{unit}" in headers
    ]
    return max((seconds for seconds in resets if seconds is not None), default=None)


def duration(text: str) -> float | None:
    """Seconds of "1m30s", "250ms" or "12"."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", text)
    return sum(float(number) * _UNIT[unit] for number, unit in parts) if parts else None


async def missing_models(models: list[OpenAIEndpoint]) -> dict[str, list[str]]:
    """The names of models that their endpoints do not offer, each with the models that they do offer; costs nothing.

    A model of an endpoint without a list counts as offered. Raises ValueError if the key or the address is wrong.
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
                    raise ValueError(f"{model.name} at {public_url(model.url)}: {fault} ({fault.kind})") from None
                offered[model.url] = None
        known = offered[model.url]
        if known is not None and model.model not in known:
            missing[model.name] = known
    return missing
