"""What every request passes before it is read: host, origin, key, room in the queue, and the size of its body."""

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from echo4o.serving.engine import Engine
from echo4o.serving.errors import ApiError, error_response

_OPEN_PATHS = ("/health",)
_API = ("/v1/", "/metrics")
_DRAIN_BYTES, _DRAIN_SECONDS = 2**20, 2.0  # of the body of a refused request


class Guard:
    """ASGI middleware around the whole server.

    Args:
        app: the server.
        engine: its queue; requests are refused while it is full.
        key: the key that clients of the API must send; None: no key.
        local: the server listens on this machine only, so that the Host header names it; other names are refused
            (a web page can let its own name point to 127.0.0.1).
    """

    def __init__(self, app: ASGIApp, engine: Engine, key: str | None = None, local: bool = True):
        self.app, self.engine, self.key, self.local = app, engine, key, local
        self.limits = engine.model.limits
        self._open = 0  # requests with a body that are being served
        self._most_open = self.limits.queue + self.limits.batch + 8

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        counts = scope["method"] == "POST" and scope["path"].startswith(_API)
        statuses: list[int] = []
        try:
            self._check(scope)
            self._open += counts
            try:
                await self.app(scope, self._limited(scope, receive), _recorded(send, statuses))
            finally:
                self._open -= counts
        except ApiError as error:
            # A client reads the answer when it has sent its body. Of a large one the rest is not awaited.
            complete = await _drain(receive)
            response = error_response(error, {} if complete else {"Connection": "close"})
            await response(scope, receive, _recorded(send, statuses))
        if scope["path"].startswith(_API):
            status = statuses[0] if statuses else 499
            self.engine.metrics.request(scope["path"] if status != 404 else "other", status)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        host = headers.get("host", "")
        if self.local and not _is_local(host):
            raise ApiError(403, f"the host {host[:80]!r} is not this machine; use 127.0.0.1 or localhost")
        if not path.startswith(_API) or path in _OPEN_PATHS:
            return
        if self.key is not None:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), self.key.encode()):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        origin = headers.get("origin")
        if self.key is None and origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, "a page of another site must not use this server without a key")
        if scope["method"] != "POST":
            return
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.limits.upload_bytes:
            raise too_large(self.limits.upload_bytes)
        if self.engine.waiting >= self.limits.queue or self._open >= self._most_open:
            self.engine.metrics.count("rejected")
            raise queue_full(self.engine.retry_after())

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that counts the bytes of the body, and does not wait for it forever."""
        if not scope["path"].startswith(_API):
            return receive
        state = {"bytes": 0, "complete": scope["method"] != "POST"}
        deadline = asyncio.get_running_loop().time() + self.limits.upload_seconds

        async def limited() -> Message:
            if state["complete"]:
                return await receive()
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except TimeoutError:
                raise ApiError(408, f"the body did not arrive within {self.limits.upload_seconds:g} s") from None
            state["bytes"] += len(message.get("body", b""))
            state["complete"] = not message.get("more_body", False)
            if state["bytes"] > self.limits.upload_bytes:
                raise too_large(self.limits.upload_bytes)
            return message

        return limited


async def _drain(receive: Receive) -> bool:
    """Read the rest of a small body; whether it is complete."""
    read = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while read <= _DRAIN_BYTES:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    return False


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"the request is larger than {limit} bytes, this server's limit", code="request_too_large")


def queue_full(retry_after: int) -> ApiError:
    return ApiError(
        429, f"the queue is full; try again in {retry_after} s", code="rate_limit_exceeded", retry_after=retry_after
    )


def _is_local(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _recorded(send: Send, statuses: list[int]) -> Callable:
    async def recorded(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        await send(message)

    return recorded
