"""The server: the API, the app and the guard around both, in one process."""

import socket
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from echo4o import __version__
from echo4o.serving.chat_api import ChatApi
from echo4o.serving.engine import Engine
from echo4o.serving.errors import ApiError, error_response
from echo4o.serving.guard import Guard
from echo4o.serving.images_api import ImagesApi
from echo4o.serving.waiting import ClientGone, api_error

if TYPE_CHECKING:
    from echo4o.serving.app.history import History


def build_api(engine: Engine) -> FastAPI:
    """The API of an engine, without the app and the guard."""
    api = FastAPI(title="echo4o", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    images, chat = ImagesApi(engine), ChatApi(engine)
    api.add_route("/v1/images/generations", images.generations, methods=["POST"])
    api.add_route("/v1/images/edits", images.edits, methods=["POST"])
    api.add_route("/v1/chat/completions", chat.completions, methods=["POST"])
    information = _Information(engine)
    api.add_route("/v1/models", information.models)
    api.add_route("/v1/models/{name:path}", information.one_model)
    api.add_route("/health", information.health)
    api.add_route("/metrics", information.metrics)
    api.add_route("/v1/{path:path}", _unknown, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])
    for kind in (ApiError, ValueError, ClientGone):
        api.add_exception_handler(kind, _answer_error)
    api.add_exception_handler(Exception, _answer_error)
    return api


class _Information:
    """What clients can ask about the server."""

    def __init__(self, engine: Engine):
        self.engine, self.model = engine, engine.model

    def _entry(self) -> dict[str, Any]:
        model = self.model
        return {
            "id": model.name,
            "object": "model",
            "created": 0,
            "owned_by": "echo4o",
            "root": model.source or model.name,
            "pipeline": type(model.pipe).__name__,
            "adapters": model.adapter_names,
            "default_adapters": [{"name": name, "scale": scale} for name, scale in model.default_adapters],
            "image_fields": sorted(model.image_options),
            "chat_fields": sorted(model.chat_options),
        }

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def one_model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model.name:
            raise ApiError(404, f"model: it is not served here; use {self.model.name!r}", code="model_not_found")
        return JSONResponse(self._entry())

    async def health(self, request: Request) -> Response:
        engine = self.engine
        return JSONResponse({"status": "ok", "waiting": engine.waiting, "running": engine.running})

    async def metrics(self, request: Request) -> Response:
        engine = self.engine
        text = engine.metrics.text(waiting=engine.waiting, running=engine.running)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _unknown(request: Request) -> Response:
    raise ApiError(404, f"there is no {request.method} {request.url.path[:80]} here", code="not_found")


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it
    return error_response(api_error(error))


def build_server(
    engine: Engine,
    *,
    key: str | None = None,
    local: bool = True,
    with_app: bool = True,
    history: "History | None" = None,
) -> Guard:
    """The whole server as an ASGI application.

    Args:
        key: the key of the API, and the password of the app; None: both are open.
        local: accept only requests that name this machine as their host.
        with_app: serve the app at `/`.
        history: where the app keeps images; None: until the server ends.
    """
    api = build_api(engine)
    if with_app:
        from echo4o.serving.app.page import mount_app

        mount_app(api, engine, key, history)
    return Guard(api, engine, key, local)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError if the address is in use or unknown."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = "another server uses this port; choose one with --port" if error.errno == 98 else error.strerror
        raise ValueError(f"cannot listen on {host}:{port}: {reason or error}") from None


def run(engine: Engine, listening: socket.socket, server: Guard) -> None:
    """Serve until interrupted, then cancel what waits and runs."""
    config = uvicorn.Config(
        server,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        engine.close()
        listening.close()
