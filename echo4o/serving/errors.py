"""Errors of the API, in the form that OpenAI's clients read."""

from collections.abc import Mapping

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that the client is told.

    Args:
        status: of HTTP.
        message: one sentence; `field: ...` at its start names the field of the request.
        code: a short name for programs.
        retry_after: seconds to wait.
    """

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after

    def body(self) -> dict:
        field, colon, _ = self.message.partition(":")
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": field if colon and " " not in field else None,
                "code": self.code,
            }
        }


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The response for an error."""
    more = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers={**(headers or {}), **more})
