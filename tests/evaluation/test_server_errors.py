"""What servers say when a call fails: their words are kept, their codes are recognised."""

import json

import pytest

from echo4o.endpoints.chat_endpoint import read_content
from echo4o.endpoints.openai_connection import OpenAIEndpoint
from echo4o.endpoints.server_errors import ServerError

WORDS = {
    "openai": ({"error": {"message": "too large", "type": "x", "code": None, "param": None}}, "too large"),
    "error as text (Ollama, TGI)": ({"error": "needs more memory", "error_type": "overloaded"}, "needs more memory"),
    "detail (transformers serve)": ({"detail": "Unexpected fields"}, "Unexpected fields"),
    "detail of FastAPI": ({"detail": [{"loc": ["body", "n"], "msg": "not a number"}]}, "body.n: not a number"),
    "vLLM before 0.10": ({"object": "error", "message": "too long", "code": 400}, "too long"),
    "a list (Google)": ([{"error": {"code": 400, "message": "bad", "status": "INVALID_ARGUMENT"}}], "bad"),
    "gateway (Azure)": ({"statusCode": 401, "message": "Access denied"}, "Access denied"),
    "problem+json": ({"title": "Gone", "status": 410}, "Gone"),
    "message within message": ({"message": {"error": {"message": "deep"}}}, "deep"),
    "errors": ({"errors": [{"message": "one"}, {"message": "two"}]}, "one; two"),
    "nothing known": ({"odd": 1}, '{"odd": 1}'),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_json(name):
    body, words = WORDS[name]
    assert ServerError.read(400, json.dumps(body)).words == words


def test_words_of_text_and_pages():
    assert ServerError.read(404, "404 page\nnot found\n").words == "404 page not found"
    page = "<!DOCTYPE html><html><head><title>502 Bad &amp; Gateway</title></head><body>nginx</body></html>"
    assert ServerError.read(502, page).words == "502 Bad & Gateway"
    assert ServerError.read(502, "<html><h1>Sign in</h1><p>please</p></html>").words == "Sign in"
    assert (
        ServerError.read(502, "<html><body><script>x()</script><p>please wait</p></body></html>").words
        == "please wait"
    )


SCHEMA = {
    "openai": (400, {"error": {"message": "Invalid parameter", "param": "response_format", "code": None}}),
    "azure": (400, {"error": {"message": "response_format value as json_schema is enabled only for api versions"}}),
    "vllm": (400, {"error": {"message": "Grammar error: unsupported", "type": "BadRequestError", "code": 400}}),
    "llama.cpp": (500, {"error": {"message": "JSON schema conversion failed", "code": 500, "type": "server_error"}}),
    "tgi": (422, {"error": "Input validation error: grammar is not supported", "error_type": "validation"}),
    "tgi, plain text": (422, "Failed to deserialize the JSON body into the target type: response_format: unknown"),
    "ollama": (400, {"error": "invalid JSON schema in format"}),
    "litellm": (400, {"error": {"message": "litellm.UnsupportedParamsError: parameters: ['response_format']"}}),
    "transformers serve": (422, {"detail": "Unexpected fields in the request: {'response_format'}"}),
    "upper case": (400, {"error": {"message": "Structured Outputs are not available"}}),
}


@pytest.mark.parametrize("name", SCHEMA)
def test_refused_structured_output(name):
    status, body = SCHEMA[name]
    error = ServerError.read(status, body if isinstance(body, str) else json.dumps(body))
    assert error.refuses_schema and not error.refuses_content and not error.is_fatal


MODERATION = {
    "azure": (400, {"error": {"code": "content_filter", "message": "No.", "innererror": {"code": "x"}}}),
    "azure, inner": (400, {"error": {"message": "No.", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}),
    "openai images": (400, {"error": {"code": "moderation_blocked", "message": "No.", "type": "user_error"}}),
    "litellm": (400, {"error": {"message": "litellm.ContentPolicyViolationError: no", "type": None, "code": "400"}}),
    "words in detail": (403, {"detail": "blocked by our content policy"}),
    "words in text": (400, "Rejected by the safety system"),
}


@pytest.mark.parametrize("name", MODERATION)
def test_content_filters(name):
    status, body = MODERATION[name]
    error = ServerError.read(status, body if isinstance(body, str) else json.dumps(body))
    assert error.refuses_content and not error.refuses_schema and not error.is_fatal


QUOTA = {
    "openai": (429, {"error": {"message": "Quota", "type": "insufficient_quota", "code": None}}),
    "litellm": (
        400,
        {"error": {"message": "Budget has been exceeded! 3 > 2", "type": "budget_exceeded", "code": "400"}},
    ),
    "words": (429, {"detail": "You exceeded your current quota"}),
    "azure gateway": (403, {"statusCode": 403, "message": "Out of call volume quota."}),
    "balance": (402, {"error": {"message": "Insufficient Balance", "type": "unknown_error"}}),
}


@pytest.mark.parametrize("name", QUOTA)
def test_quotas(name):
    status, body = QUOTA[name]
    assert ServerError.read(status, json.dumps(body)).is_fatal


def test_what_passes_is_not_a_quota():
    limit = {"error": {"message": "You exceeded your current quota, retry later", "code": 429}}
    assert not ServerError.read(429, json.dumps(limit), wait=31.0).is_fatal
    assert not ServerError.read(400, json.dumps({"error": {"message": "the prompt is too long"}})).refuses_schema
    assert not ServerError.read(429, json.dumps({"error": {"message": "slow down", "code": "429"}})).is_fatal


CONTENT = {
    "text": ("a", ("a", None)),
    "null": (None, ("", None)),
    "parts": ([{"type": "thinking", "thinking": []}, {"type": "text", "text": "a"}], ("a", None)),
    "texts": (["a", "b"], ("ab", None)),
    "of the Responses API": ([{"type": "output_text", "text": "a"}], ("a", None)),
    "of assistants": ([{"type": "text", "text": {"value": "a"}}], ("a", None)),
    "a refusal": ([{"type": "refusal", "refusal": "no"}], ("", "no")),
    "reasoning only": ([{"type": "thinking", "thinking": "hm"}], ("", None)),
    "parsed JSON": ({"correct": 1}, ('{"correct": 1}', None)),
    "one part": ({"type": "text", "text": "a"}, ("a", None)),
    "null text": ([{"type": "text", "text": None}, None], ("", None)),
}


@pytest.mark.parametrize("name", CONTENT)
def test_content_in_every_form(name):
    content, expected = CONTENT[name]
    assert read_content(content) == expected


class Endpoint(OpenAIEndpoint):
    def identity(self):
        return {}

    async def ask(self, request, key):
        raise NotImplementedError


@pytest.mark.parametrize(
    "given, called",
    [
        ("http://h/v1", "http://h/v1/chat/completions"),
        ("http://h/v1/?a=1", "http://h/v1/chat/completions?a=1"),
        ("http://h/openai/deployments/m?api-version=1", "http://h/openai/deployments/m/chat/completions?api-version=1"),
        ("http://h/openai/deployments/m/chat/completions?api-version=1&b=",
         "http://h/openai/deployments/m/chat/completions?api-version=1&b="),
        (" http://h/v1/chat/completions/\n", "http://h/v1/chat/completions"),
        ("http://h/v1#part", "http://h/v1/chat/completions"),
    ],
)  # fmt: skip
def test_addresses_of_calls(given, called):
    from openai._models import FinalRequestOptions

    endpoint = Endpoint("m", given, "OPENAI_API_KEY", 5.0)
    request = endpoint.connect()._build_request(FinalRequestOptions(method="post", url="/chat/completions"))
    assert str(request.url) == called


@pytest.mark.parametrize(
    "url, words",
    [
        ("http:///v1", "has no host, or a port that is not a number"),
        ("http://h:port/v1?key=AIzaSecret", "has no host, or a port that is not a number"),
        ("http://[::1/v1", "Invalid IPv6 URL|has no host"),
        ("http://h/v1?tag=a&tag=b", "sets a parameter twice: tag, tag"),
    ],
)
def test_addresses_that_cannot_be_called(url, words):
    with pytest.raises(ValueError, match=words) as caught:
        Endpoint("m", url, "OPENAI_API_KEY", 5.0)
    assert "AIzaSecret" not in str(caught.value)


def test_azure_deployments_get_the_key_in_its_own_header(monkeypatch):
    from openai._models import FinalRequestOptions

    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-azure")
    endpoint = Endpoint("m", "https://x.openai.azure.com/openai/deployments/m?api-version=1", "OPENAI_API_KEY", 5.0)
    options = FinalRequestOptions(method="post", url="/chat/completions", headers=endpoint.headers("k"))
    request = endpoint.connect()._build_request(options)
    assert request.headers["api-key"] == "secret-of-azure" and "authorization" not in request.headers
    other = Endpoint("m", "http://127.0.0.1/openai/deployments/m", "OPENAI_API_KEY", 5.0)
    assert other.headers("k") == {"Idempotency-Key": "k"}


def test_secrets_of_the_query_are_not_shown():
    endpoint = Endpoint("m", "http://h/v1?key=AIzaSecret&api-version=2024-10-21", "OPENAI_API_KEY", 5.0)
    assert endpoint.shorten("no page /v1?key=AIzaSecret&api-version=2024-10-21 " + "x" * 400).endswith("xxx...")
    assert "AIzaSecret" not in endpoint.shorten("no page /v1?key=AIzaSecret")
    assert "2024-10-21" in endpoint.shorten("api-version=2024-10-21 is not supported")


def test_halves_of_surrogate_pairs_become_marks():
    """JSON can hold them, and a file in UTF-8 cannot."""
    endpoint = Endpoint("m", "http://h/v1", "OPENAI_API_KEY", 5.0)
    assert endpoint.shorten("\ud83d cut \ud83d\ude00") == "\ufffd cut \U0001f600"


def test_parts_without_a_type_are_text():
    assert read_content([{"text": "a"}, {"type": "image_url", "image_url": {"url": "data:"}}]) == ("a", None)
