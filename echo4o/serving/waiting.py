"""Waiting for tasks from the event loop; a client that disconnects cancels its tasks."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from echo4o.serving.engine import Engine, EngineClosed, QueueFull
from echo4o.serving.errors import ApiError
from echo4o.serving.guard import queue_full
from echo4o.serving.tasks import Task
from echo4o.serving.watching import Cancelled


class ClientGone(Exception):
    """The client disconnected before its answer was ready."""


def submit(engine: Engine, tasks: Sequence[Task]) -> None:
    """Put tasks into the queue. Raises ApiError: 429 if there is no room, 503 while the server shuts down."""
    if len(tasks) > engine.model.limits.queue:
        raise ApiError(400, f"n: this server's queue holds {engine.model.limits.queue} images (given: {len(tasks)})")
    try:
        engine.submit(tasks)
    except QueueFull as full:
        raise queue_full(full.retry_after) from None
    except EngineClosed as error:
        raise ApiError(503, str(error)) from None


async def results(request: Request, tasks: Sequence[Task]) -> list[Any]:
    """The results of all tasks.

    Raises:
        ClientGone: the client disconnected; its tasks are cancelled.
        ApiError: a task failed.
    """
    waiting = asyncio.gather(*(asyncio.wrap_future(task.future) for task in tasks))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise ClientGone
        return waiting.result()
    except (Cancelled, asyncio.CancelledError):
        raise ApiError(503, "the server is shutting down") from None
    except ClientGone:
        raise
    except Exception as error:
        raise api_error(error) from None
    finally:
        gone.cancel()
        for task in tasks:
            task.cancel()  # no effect on those that are done
        waiting.cancel()
        with contextlib.suppress(BaseException):
            await waiting


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def api_error(error: Exception) -> ApiError:
    """The error that a client is told for a failed task. What a bug says stays in the server's log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Cancelled | CancelledError):
        return ApiError(503, "the server is shutting down")
    if isinstance(error, ValueError):
        return ApiError(400, " ".join(str(error).split()))
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(400, "size: not enough memory for this request; ask for a smaller image", code="out_of_memory")
    return ApiError(500, "the server failed; its log says why")


class EventStream:
    """Events of a task, brought from the engine's thread into the event loop."""

    def __init__(self, task: Task):
        self.task = task
        self._events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        task.on_event = put
        task.future.add_done_callback(lambda future: put(None))

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (event := await self._events.get()) is not None:
            yield event


def event_response(events: AsyncIterator[str]) -> StreamingResponse:
    """A response that streams server-sent events."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def server_sent(value: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"
