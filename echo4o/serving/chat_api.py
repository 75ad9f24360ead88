"""`/v1/chat/completions`: questions about images, streamed and not."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo4o.serving.engine import Engine
from echo4o.serving.errors import ApiError
from echo4o.serving.images_api import read_parts, require_model
from echo4o.serving.requests import Fields, read_json
from echo4o.serving.served_model import ServedModel, read_seed
from echo4o.serving.tasks import Answer, ChatTask, Text
from echo4o.serving.waiting import EventStream, api_error, event_response, results, server_sent, submit

_ROLES = ("system", "developer", "user", "assistant")


class ChatApi:
    """The endpoint for questions of one engine."""

    def __init__(self, engine: Engine):
        self.engine, self.model = engine, engine.model

    async def completions(self, request: Request) -> Response:
        """Answer the conversation in `messages`."""
        fields = await read_json(request)
        require_model(fields, self.model)
        messages = fields.require("messages", list)
        prompt, images = await asyncio.to_thread(read_messages, messages, self.model)
        stream = fields.take("stream", bool, False)
        usage = bool(fields.take("stream_options", dict, {}).get("include_usage"))
        count = fields.take("n", int, 1)
        if stream and count != 1:
            raise ApiError(400, "n: a stream holds one answer")
        stops = _read_stops(fields)
        tasks = self._tasks(fields, prompt, images, count, stops)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model.name,
        }
        submit(self.engine, tasks)
        prompt_tokens = self.model.count_tokens(prompt)
        if stream:
            events = self._stream(tasks[0], head, prompt_tokens if usage else None)
            return event_response(events)
        answers: list[Answer] = await results(request, tasks)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": "length" if answer.cut else "stop",
                "logprobs": None,
                "seed": task.seed,
            }
            for index, (answer, task) in enumerate(zip(answers, tasks))
        ]
        body = {"object": "chat.completion", "choices": choices, "usage": _usage(prompt_tokens, answers)}
        return JSONResponse(head | body)

    def _tasks(self, fields: Fields, prompt: str, images: list, count: int, stops: list[str]) -> list[ChatTask]:
        most = self.model.limits.images
        if not 1 <= count <= most:
            raise ApiError(400, f"n: this server gives 1 to {most} answers per request (given: {count})")
        limits = [fields.take(name, int) for name in ("max_completion_tokens", "max_tokens", "max_new_tokens")]
        options: dict[str, Any] = {}
        if any(limit is not None for limit in limits):
            options["max_new_tokens"] = next(limit for limit in limits if limit is not None)
        temperature = fields.take("temperature", (int, float))
        if temperature is not None:
            options["do_sample"] = temperature > 0
            if temperature > 0:
                options["temperature"] = temperature
        seed = read_seed(fields.take("seed", int), count)
        options = self.model.read_options(options | fields.rest(), chat=True)
        return [
            self.model.chat_task(prompt, images, seed=seed + i, options=options, stops=stops) for i in range(count)
        ]

    async def _stream(self, task: ChatTask, head: dict, prompt_tokens: int | None) -> AsyncIterator[str]:
        """Chunks of the answer. When the client disconnects, the generator is closed and the task cancelled."""

        def chunk(delta: dict, finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            return server_sent(head | {"object": "chat.completion.chunk", "choices": [choice]})

        try:
            yield chunk({"role": "assistant", "content": ""})
            sent = ""
            async for event in EventStream(task):
                if isinstance(event, Text) and len(event.text) > len(sent):
                    yield chunk({"content": event.text[len(sent) :]})
                    sent = event.text
            answer: Answer = task.future.result()
            if len(answer.text) > len(sent):
                yield chunk({"content": answer.text[len(sent) :]})
            yield chunk({}, "length" if answer.cut else "stop")
            if prompt_tokens is not None:
                usage = {"choices": [], "usage": _usage(prompt_tokens, [answer])}
                yield server_sent(head | {"object": "chat.completion.chunk"} | usage)
            yield server_sent("[DONE]")
        except Exception as error:
            yield server_sent(api_error(error).body())
        finally:
            task.cancel()


def _usage(prompt_tokens: int, answers: list[Answer]) -> dict[str, int]:
    tokens = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def _read_stops(fields: Fields) -> list[str]:
    stops = fields.take("stop", (str, list), [])
    stops = [stops] if isinstance(stops, str) else stops
    if len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise ApiError(400, "stop: must be a text, or up to four")
    return stops


def read_messages(messages: list[Any], model: ServedModel) -> tuple[str, list[Image.Image]]:
    """One prompt and all images of a conversation.

    The models answer one text about images. A conversation of several turns becomes a transcript that ends with
    `Assistant:`; a system message stands before it.

    Raises ApiError (400) for messages that are not of OpenAI's form.
    """
    turns: list[tuple[str, str]] = []
    images: list[Image.Image] = []
    for number, message in enumerate(messages):
        place = f"messages.{number}"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ApiError(400, f"{place}.role: must be one of {', '.join(_ROLES)}")
        content = message.get("content")
        if not isinstance(content, str | list):
            raise ApiError(400, f"{place}.content: must be a text or a list of parts")
        items = read_parts([content] if isinstance(content, str) else content, f"{place}.content", model)
        images += [item for item in items if not isinstance(item, str)]
        turns.append((message["role"], "\n".join(item for item in items if isinstance(item, str))))
    if not turns or turns[-1][0] != "user":
        raise ApiError(400, "messages: the last message must be the user's")
    system = [text for role, text in turns if role in ("system", "developer") and text]
    talk = [(role, text) for role, text in turns if role in ("user", "assistant")]
    if len(talk) == 1:
        return "\n".join([*system, talk[0][1]]), images
    lines = [f"{role.capitalize()}: {text}" for role, text in talk]
    return "\n".join([*system, *lines, "Assistant:"]), images
