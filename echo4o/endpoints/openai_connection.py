"""The connection to an OpenAI-compatible server (OpenAI, vLLM, SGLang, llama.cpp, ...): key, faults, requested waits."""

import os
import re
from dataclasses import replace
from email.utils import parsedate_to_datetime
from time import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from echo4o.common.model_text import valid_unicode
from echo4o.endpoints.endpoint import CallFault, Endpoint
from echo4o.endpoints.server_errors import ServerError

if TYPE_CHECKING:
    import openai

_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
RETRY_STATUS = {408, 409, 425, 429}
_LONGEST_MESSAGE = 300  # letters of what a server says
# What users append to the address of an endpoint because its documentation names the whole address of a call.
_CALLS = re.compile(r"/(?:chat/completions|completions|images/(?:generations|edits))/?$")
_SECRET_PARAMETER = re.compile(r"key|token|secret|sig|password|auth", re.I)


class OpenAIEndpoint(Endpoint):
    """The connection to one model of an OpenAI-compatible server. Keys are removed from everything that the server says.

    Args:
        model: the name of the model at the server.
        url: the address of the endpoint; None: OPENAI_BASE_URL, else OpenAI. A query (`?api-version=...`) is kept at the
            end of every call's address.
        key_variable: the environment variable that holds the key. The key itself is never an argument: arguments end
            in shell histories and process lists.
        timeout: seconds until a call counts as unanswered.
        what: the use of the model, for messages.
    """

    paid = True

    def __init__(self, model: str, url: str | None, key_variable: str, timeout: float, what: str = "judge"):
        self.model, self.name = model, f"openai:{model}"
        self.url = url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self.url = self.url.strip()
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError(f"the {what}'s URL must start with http:// or https://, it is {public_url(self.url)}")
        if urlsplit(self.url).username:
            raise ValueError(f"the {what}'s URL holds a user and password; the key belongs into {key_variable}")
        if not _has_host(self.url):
            raise ValueError(f"the {what}'s URL has no host, or a port that is not a number")
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
        self._client: openai.AsyncOpenAI | None = None
        self.url, self._query = _split_query(self.url)
        if len(dict(self._query)) < len(self._query):
            raise ValueError(f"the {what}'s URL sets a parameter twice: {', '.join(name for name, _ in self._query)}")
        self._secrets = [self._key, *(value for name, value in self._query if _SECRET_PARAMETER.search(name))]

    def headers(self, key: str | None = None) -> dict[str, Any]:
        """The headers of a call: its key for servers that bill a repeated call once, and Azure's authentication.

        Azure's deployments take the API key in a header of its own; the usual one is for tokens of Entra ID.
        """
        import openai

        headers: dict[str, Any] = {} if key is None else {"Idempotency-Key": key}
        parts = urlsplit(self.url)
        if (parts.hostname or "").endswith(".azure.com") and "/deployments/" in parts.path:
            headers |= {"api-key": self._key, "Authorization": openai.Omit()}
        return headers

    def connect(self) -> "openai.AsyncOpenAI":
        """The client, which is made once."""
        import openai

        if self._client is None:
            # Calls are repeated by our Caller, which records every fault.
            self._client = openai.AsyncOpenAI(
                api_key=self._key,
                base_url=self.url,
                default_query=dict(self._query),
                max_retries=0,
                timeout=self.timeout,
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
            reason = self.shorten(str(error.__cause__ or error))
            return CallFault("connection", f"{public_url(self.url)}: {reason}", retry=True)
        # 200 with a body that is not an answer
        return CallFault("bad_response", self.shorten(f"the response is broken: {error}"), retry=True)

    def server_error(self, error: "openai.APIStatusError") -> ServerError:
        """What the server says in a response with an error status."""
        response = error.response
        try:
            text = response.text
        except Exception:  # a body that could not be read or decoded
            text = ""
        server_error = ServerError.read(error.status_code, text, wait_of(response.headers))
        return server_error if server_error.words else replace(server_error, words=_reason_of(error))

    def _fault_of_status(self, error: "openai.APIStatusError") -> CallFault:
        return self.fault_of_server(self.server_error(error))

    def fault_of_server(self, error: ServerError) -> CallFault:
        """The fault of an error that the server describes."""
        status, fatal = error.status, error.is_fatal
        retry = not fatal and (status is None or status in RETRY_STATUS or status >= 500)
        kind = "bad_response" if status is None else f"http_{status}"
        return CallFault(
            kind,
            self.shorten(error.words),
            retry,
            error.wait if retry else None,
            fatal,
            error.code,
            refuses_content=error.refuses_content,
        )

    def fault_in_answer(self, response: Any) -> CallFault:
        """The fault of a response of 200 without an answer: an error object, or the page of a proxy."""
        if isinstance(response, str):
            error = ServerError.read(None, response)
        else:
            extra = getattr(response, "model_extra", None) or {}
            body = {key: extra[key] for key in ("error", "detail", "message", "errors") if extra.get(key)}
            error = ServerError.of_body(None, body) if body else ServerError(None, "")
        if not error.words:
            return CallFault("bad_response", "the response does not hold an answer", retry=True)
        fault = self.fault_of_server(replace(error, status=error.status_in_body))
        fault.args = (f"the response does not hold an answer; the server says: {fault}",)
        return fault

    def shorten(self, text: str) -> str:
        """The text without the key, cut to a readable length afterwards, so that no part of the key stays."""
        text = self.redact(text)
        return text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."

    def redact(self, text: str) -> str:
        """The text without the key and the secrets of the address, which servers quote in their messages.

        It is valid Unicode, which JSON of a server need not be.
        """
        text = valid_unicode(text)
        for secret in self._secrets:
            text = text.replace(secret, "[key]") if len(secret) >= 6 else text
        return text


def public_url(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path.rstrip('/')}"


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # the port is not a number, or a bracket of an IPv6 address is missing
        return False


def _split_query(url: str) -> tuple[str, list[tuple[str, str]]]:
    """The address that paths of calls are appended to, and the query that follows them."""
    parts = urlsplit(url)
    path = _CALLS.sub("", parts.path)
    return urlunsplit((parts.scheme, parts.netloc, path, "", "")), parse_qsl(parts.query, keep_blank_values=True)


def _reason_of(error: "openai.APIStatusError") -> str:
    reason = getattr(error.response, "reason_phrase", "")
    return f"{reason or 'an error'} without a message"


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
                offered[model.url] = sorted(
                    [m.id async for m in model.connect().models.list(extra_headers=model.headers())]
                )
            except (openai.APIError, ValueError, TypeError, AttributeError) as error:
                fault = model.fault_of(error)
                if fault.kind in ("http_401", "http_403", "connection", "timeout"):
                    raise ValueError(f"{model.name} at {public_url(model.url)}: {fault} ({fault.kind})") from None
                offered[model.url] = None
        known = offered[model.url]
        if known is not None and model.model not in known:
            missing[model.name] = known
    return missing
