"""What a server says about a failed call: its words and its codes, in the forms of the common servers.

Read are the bodies of OpenAI, Azure, vLLM, llama.cpp, TGI, Ollama, LiteLLM and `transformers serve`: JSON with an
`error`, `detail` or `message` at some depth, plain text, and the HTML pages of proxies.
"""

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MESSAGES = ("message", "Message", "msg", "detail", "error_description", "error_msg", "title", "reason")
_INNER = ("error", "detail", "errors", "details", "innererror", "inner_error")
_CODES = ("code", "type", "error_type", "status", "param", "__type")
_MOST_DEPTH = 8  # levels of a body

# Codes and words are compared in lower case, codes without underscores.
_MODERATION = {
    "moderationblocked", "contentpolicyviolation", "contentpolicyviolationerror", "contentfilter", "contentfiltered",
    "contentfiltererror", "responsibleaipolicyviolation", "promptblocked", "datainspectionfailed", "safety",
}  # fmt: skip
_MODERATION_WORDS = (
    "safety system", "content policy", "content management policy", "content filter", "content_filter", "moderation",
    "contentpolicyviolation", "responsible ai", "usage policies", "safety filter", "guardrail", "data_inspection_failed",
)  # fmt: skip
_QUOTA = {
    "insufficientquota", "billinghardlimitreached", "billingnotactive", "budgetexceeded", "insufficientbalance",
    "insufficientuserquota", "insufficientcredits", "exceededcurrentquotaerror", "accountdeactivated", "arrearage",
}  # fmt: skip
_QUOTA_WORDS = (
    "insufficient_quota", "exceeded your current quota", "insufficient balance", "insufficient credits",
    "insufficient_user_quota", "budget has been exceeded", "budgetexceedederror", "credit balance is too low",
    "out of call volume quota", "billing hard limit",
)  # fmt: skip
_LOST_MODEL = {"modelnotfound", "deploymentnotfound", "notfounderror"}
_WRONG_KEY = {"invalidapikey", "authenticationerror"}
_SCHEMA_PARAMS = {"responseformat", "responseformat.type", "responseformat.jsonschema", "grammar", "guidedjson"}
_SCHEMA_WORDS = (
    "response_format", "response format", "responseformat", "json_schema", "json schema", "structured output",
    "structured_output", "guided", "grammar", "schema",
)  # fmt: skip
_SCHEMA_STATUS = {400, 404, 415, 422, 500, 501}


@dataclass(frozen=True)
class ServerError:
    """The error in a response.

    Args:
        status: of HTTP, or the one within a body that came with 200; None: unknown.
        words: what the server says, in one line.
        codes: its codes, types and parameters in lower case and without underscores.
        code: the first code as the server writes it.
        wait: whether the server asked to wait, which tells a rate limit from a used-up quota.
    """

    status: int | None
    words: str
    codes: frozenset[str] = frozenset()
    code: str | None = None
    wait: float | None = None

    @classmethod
    def read(cls, status: int | None, text: str, wait: float | None = None) -> "ServerError":
        """The error in the body of a response."""
        try:
            body = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            return cls(status, _plain_words(text), wait=wait)
        return cls.of_body(status, body, wait)

    @classmethod
    def of_body(cls, status: int | None, body: Any, wait: float | None = None) -> "ServerError":
        """The error in a parsed body."""
        codes = [code for code in _codes(body) if code]
        named = next((code for code in codes if not code.isdigit()), None)
        plain = frozenset(code.lower().replace("_", "") for code in codes)
        return cls(status, _one_line(_words(body) or json.dumps(body)), plain, named, wait)

    @property
    def status_in_body(self) -> int | None:
        """The HTTP status among the codes, where a response of 200 holds an error."""
        return next((int(code) for code in self.codes if re.fullmatch(r"[45]\d\d", code)), None)

    @property
    def refuses_content(self) -> bool:
        """Whether a moderation or content filter refuses the content, rather than the server the request."""
        if self.codes & _MODERATION:
            return True
        return self.status in (400, 403, 422, 451) and _has(self.words, _MODERATION_WORDS)

    @property
    def refuses_schema(self) -> bool:
        """Whether the server does not take the requested structured output."""
        if self.refuses_content or self.status not in _SCHEMA_STATUS:
            return False
        return bool(self.codes & _SCHEMA_PARAMS) or _has(self.words, _SCHEMA_WORDS)

    @property
    def is_out_of_quota(self) -> bool:
        """Whether no call can succeed until something is paid."""
        if self.codes & _QUOTA:
            return True
        return self.status in (400, 402, 403, 429) and self.wait is None and _has(self.words, _QUOTA_WORDS)

    @property
    def is_fatal(self) -> bool:
        """Whether no other call can succeed either: a wrong key or address, an unknown model, no money."""
        if self.status in (401, 402, 403, 404, 405):
            return not (self.status == 403 and self.refuses_content)
        return self.is_out_of_quota or bool(self.codes & (_LOST_MODEL | _WRONG_KEY))


def _has(words: str, known: tuple[str, ...]) -> bool:
    lower = words.lower()
    return any(each in lower for each in known)


def _words(value: Any, depth: int = 0) -> str:
    if isinstance(value, str):
        return value
    if depth == _MOST_DEPTH:
        return ""
    if isinstance(value, list):
        return "; ".join(filter(None, (_words(item, depth + 1) for item in value)))
    if not isinstance(value, dict):
        return ""
    found = next((value[key] for key in _MESSAGES if isinstance(value.get(key), str) and value[key].strip()), "")
    if found:
        place = value.get("loc")  # of FastAPI: the field that does not fit
        return f"{'.'.join(map(str, place))}: {found}" if isinstance(place, list) else found
    return next(filter(None, (_words(value.get(key), depth + 1) for key in (*_INNER, *_MESSAGES))), "")


def _codes(value: Any, depth: int = 0) -> Iterator[str]:
    if depth == _MOST_DEPTH:
        return
    if isinstance(value, list):
        for item in value:
            yield from _codes(item, depth + 1)
    if not isinstance(value, dict):
        return
    for key in _CODES:
        if isinstance(value.get(key), str | int) and not isinstance(value[key], bool):
            yield str(value[key])
    for key in _INNER:
        yield from _codes(value.get(key), depth + 1)


def _plain_words(text: str) -> str:
    """The title of an HTML page, else its text; other text as it is."""
    if re.search(r"<(?:!doctype|html|head|body|h1|title)\b", text[:2000], re.I):
        title = re.search(r"<title[^>]*>(.*?)</title>", text, re.I | re.S) or re.search(
            r"<h1[^>]*>(.*?)</h1>", text, re.I | re.S
        )
        text = title[1] if title and title[1].strip() else re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.S)
        text = html.unescape(re.sub(r"<[^>]*>", " ", text))
    return _one_line(text)


def _one_line(text: str) -> str:
    return " ".join(text.split())
