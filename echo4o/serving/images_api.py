"""`/v1/images/generations` and `/v1/images/edits`."""

import asyncio
import time
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo4o.serving.engine import Engine
from echo4o.serving.errors import ApiError
from echo4o.serving.image_output import FORMATS, OutputFormat, describe, image_events
from echo4o.serving.requests import Fields, read_form, read_json, read_size
from echo4o.serving.served_model import ServedModel
from echo4o.serving.tasks import GeneratedImage, ImageTask
from echo4o.serving.uploads import open_upload, read_data_url
from echo4o.serving.waiting import EventStream, event_response, results, submit

_MOST_PARTIAL = 3  # as OpenAI's API
_MAX_FILES = 64  # of one request, whatever the checkpoint allows


class ImagesApi:
    """The endpoints for images of one engine."""

    def __init__(self, engine: Engine):
        self.engine, self.model = engine, engine.model

    async def generations(self, request: Request) -> Response:
        """Generate images from a prompt, from interleaved `inputs`, or with references in `images` (data URLs)."""
        fields = await read_json(request)
        items = await asyncio.to_thread(self._read_items, fields)
        return await self._run(request, fields, items, "image_generation")

    async def edits(self, request: Request) -> Response:
        """Generate images from a prompt and one or several reference images of a form."""
        limits = self.model.limits
        fields, files = await read_form(request, _MAX_FILES, limits.upload_bytes)
        prompt = fields.require("prompt", str)
        if not files:
            raise ApiError(400, "image: is missing; send one or several files as `image`")
        if self.model.max_references is not None and len(files) > self.model.max_references:
            raise ApiError(
                400, f"image: {len(files)} reference images; this model takes at most {self.model.max_references}"
            )
        items: list[str | Image.Image] = await asyncio.to_thread(
            lambda: [open_upload(data, f"image {n}", limits.upload_pixels) for n, data in enumerate(files, 1)]
        )
        return await self._run(request, fields, [*items, prompt], "image_edit")

    def _read_items(self, fields: Fields) -> list[str | Image.Image]:
        inputs, urls = fields.take("inputs", list), fields.take("images", list, [])
        if inputs is None:
            prompt = fields.require("prompt", str)
            inputs = [*({"type": "image_url", "image_url": url} for url in urls), prompt]
        elif fields.take("prompt", str) is not None or urls:
            raise ApiError(400, "inputs: stands for prompt and images; send one or the other")
        return read_parts(inputs, "inputs", self.model)

    async def _run(self, request: Request, fields: Fields, items: list[str | Image.Image], kind: str) -> Response:
        """Answer a request; `kind` is the first part of the names of streamed events."""
        require_model(fields, self.model)
        output = read_output(fields)
        stream, partial = fields.take("stream", bool, False), fields.take("partial_images", int, 0)
        if not 0 <= partial <= _MOST_PARTIAL:
            raise ApiError(400, f"partial_images: must be from 0 to {_MOST_PARTIAL} (given: {partial})")
        if partial and not stream:
            raise ApiError(400, 'partial_images: needs "stream": true')
        tasks = self._tasks(fields, items, previews=partial)
        if stream:
            if len(tasks) != 1:
                raise ApiError(400, "n: a stream holds one image")
            events = EventStream(tasks[0])
            submit(self.engine, tasks)
            tokens = self.model.count_tokens(tasks[0].text)
            return event_response(image_events(tasks[0], events, output, kind, partial, tokens))
        submit(self.engine, tasks)
        images = await results(request, tasks)
        return JSONResponse(await asyncio.to_thread(_answer, images, output))

    def _tasks(self, fields: Fields, items: list[str | Image.Image], previews: int) -> list[ImageTask]:
        height, width = read_size(fields)
        count, seed = fields.take("n", int, 1), fields.take("seed", int)
        names = fields.take("adapter", (str, list))
        scales = fields.take("adapter_scale", (int, float, list))
        return self.model.image_tasks(
            items,
            count=count,
            seed=seed,
            height=height,
            width=width,
            options=self.model.read_options(fields.rest()),
            adapters=self.model.read_adapters(names, scales),
            previews=previews,
        )


def read_output(fields: Fields) -> OutputFormat:
    """The format in which a request asks for its images."""
    name = fields.take("output_format", str, "png")
    if name not in FORMATS:
        raise ApiError(400, f"output_format: must be one of {', '.join(FORMATS)} (given: {name[:40]!r})")
    quality = fields.take("output_compression", int, 100)
    if not 0 <= quality <= 100:
        raise ApiError(400, f"output_compression: must be from 0 to 100 (given: {quality})")
    return OutputFormat(name, quality)


def require_model(fields: Fields, model: ServedModel) -> None:
    """Raise ApiError (404) if a request names another model than the one that is served."""
    name = fields.take("model", str, model.name)
    if name not in (model.name, model.source):
        raise ApiError(404, f"model: {name[:80]!r} is not served here; use {model.name!r}", code="model_not_found")


def read_parts(parts: list[Any], place: str, model: ServedModel) -> list[str | Image.Image]:
    """Texts and images of a list of strings and content parts, in order.

    Raises ApiError (400) for anything else.
    """
    items: list[str | Image.Image] = []
    most = model.max_references if model.max_references is not None else _MAX_FILES
    for part in parts:
        if isinstance(part, str):
            items.append(part)
        elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            items.append(part["text"])
        elif isinstance(part, dict) and part.get("type") == "image_url":
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if sum(not isinstance(item, str) for item in items) >= most:
                raise ApiError(400, f"{place}: more than {most} images, which is what this model takes")
            items.append(read_data_url(url, f"{place}: image", model.limits.upload_pixels))
        else:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ApiError(400, f"{place}: parts are texts and image_url, not {str(kind)[:40]!r}")
    return items


def _answer(images: list[GeneratedImage], output: OutputFormat) -> dict[str, Any]:
    data = [describe(generated) | {"b64_json": output.base64(generated)} for generated in images]
    return {"created": int(time.time()), "output_format": output.name, "data": data}
