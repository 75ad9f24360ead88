"""`/v1/images/generations` and `/v1/images/edits`."""

import asyncio
import base64
import io
import time
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from echo4o.common.image_metadata import to_png
from echo4o.serving.engine import Engine
from echo4o.serving.errors import ApiError
from echo4o.serving.requests import Fields, read_form, read_json, read_size
from echo4o.serving.served_model import ServedModel
from echo4o.serving.tasks import GeneratedImage, ImageTask
from echo4o.serving.uploads import open_upload, read_data_url
from echo4o.serving.waiting import results, submit

_FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
_MAX_FILES = 64  # of one request, whatever the checkpoint allows


class ImagesApi:
    """The endpoints for images of one engine."""

    def __init__(self, engine: Engine):
        self.engine, self.model = engine, engine.model

    async def generations(self, request: Request) -> Response:
        """Generate images from a prompt, from interleaved `inputs`, or with references in `images` (data URLs)."""
        fields = await read_json(request)
        items = await asyncio.to_thread(self._read_items, fields)
        return await self._run(request, fields, items)

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
        return await self._run(request, fields, [*items, prompt])

    def _read_items(self, fields: Fields) -> list[str | Image.Image]:
        inputs, urls = fields.take("inputs", list), fields.take("images", list, [])
        if inputs is None:
            prompt = fields.require("prompt", str)
            inputs = [*({"type": "image_url", "image_url": url} for url in urls), prompt]
        elif fields.take("prompt", str) is not None or urls:
            raise ApiError(400, "inputs: stands for prompt and images; send one or the other")
        return read_parts(inputs, "inputs", self.model)

    async def _run(self, request: Request, fields: Fields, items: list[str | Image.Image]) -> Response:
        require_model(fields, self.model)
        as_format = fields.take("output_format", str, "png")
        if as_format not in _FORMATS:
            raise ApiError(400, f"output_format: must be one of {', '.join(_FORMATS)} (given: {as_format[:40]!r})")
        quality = fields.take("output_compression", int, 100)
        if not 0 <= quality <= 100:
            raise ApiError(400, f"output_compression: must be from 0 to 100 (given: {quality})")
        if fields.take("stream", bool, False):
            raise ApiError(400, "stream: images are not streamed")
        tasks = self._tasks(fields, items)
        submit(self.engine, tasks)
        images = await results(request, tasks)
        return JSONResponse(await asyncio.to_thread(_answer, images, as_format, quality))

    def _tasks(self, fields: Fields, items: list[str | Image.Image]) -> list[ImageTask]:
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
        )


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


def encode(generated: GeneratedImage, as_format: str = "png", quality: int = 100) -> bytes:
    """An image as the bytes of a file; PNG files store what the image was generated from."""
    if as_format == "png":
        return to_png(generated.image, generated.metadata)
    stream = io.BytesIO()
    generated.image.save(stream, _FORMATS[as_format], quality=quality)
    return stream.getvalue()


def _answer(images: list[GeneratedImage], as_format: str, quality: int) -> dict[str, Any]:
    data = []
    for generated in images:
        entry = {
            "b64_json": base64.b64encode(encode(generated, as_format, quality)).decode(),
            "seed": generated.seed,
            "settings": generated.settings,
        }
        if generated.plan is not None:
            entry["plan"] = generated.plan
        data.append(entry)
    return {"created": int(time.time()), "output_format": as_format, "data": data}
