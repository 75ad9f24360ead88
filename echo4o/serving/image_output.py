"""Images as clients receive them: encoded, with their seed and settings, whole or as a stream of events."""

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from echo4o.common.image_metadata import to_png
from echo4o.serving.tasks import GeneratedImage, ImageTask, Progress
from echo4o.serving.waiting import EventStream, api_error, server_sent

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


@dataclass(frozen=True)
class OutputFormat:
    """A file format of `FORMATS`; `quality` is from 0 to 100, for those that lose details."""

    name: str = "png"
    quality: int = 100

    def encode(self, image: GeneratedImage | Image.Image) -> bytes:
        """The bytes of a file. The PNG file of a [`GeneratedImage`] stores what it was generated from."""
        if isinstance(image, GeneratedImage):
            pixels, metadata = image.image, image.metadata
        else:
            pixels, metadata = image, None
        if self.name == "png":
            return to_png(pixels, metadata)
        stream = io.BytesIO()
        pixels.save(stream, FORMATS[self.name], quality=self.quality)
        return stream.getvalue()

    def base64(self, image: GeneratedImage | Image.Image) -> str:
        return base64.b64encode(self.encode(image)).decode()


def describe(generated: GeneratedImage) -> dict[str, Any]:
    """What is returned beside an image: its seed, all its settings, and the plan of `think`."""
    plan = {} if generated.plan is None else {"plan": generated.plan}
    return {"seed": generated.seed, "settings": generated.settings, **plan}


async def image_events(
    task: ImageTask, events: EventStream, output: OutputFormat, kind: str, partial: int, prompt_tokens: int
) -> AsyncIterator[str]:
    """Server-sent events of one image: at most `partial` previews, then the image or an error.

    When the client disconnects, the generator is closed and the task cancelled.

    Args:
        kind: "image_generation" or "image_edit".
        prompt_tokens: tokens of the text, for the usage.
    """

    async def sent(name: str, image: GeneratedImage | Image.Image, **more: Any) -> str:
        pixels = image.image if isinstance(image, GeneratedImage) else image
        event = {
            "type": f"{kind}.{name}",
            "b64_json": await asyncio.to_thread(output.base64, image),
            "created_at": int(time.time()),
            "size": f"{pixels.width}x{pixels.height}",
            "quality": "auto",
            "background": "opaque",
            "output_format": output.name,
        }
        return server_sent(event | more, event["type"])

    number = 0
    try:
        async for event in events:
            if isinstance(event, Progress) and event.preview is not None and number < partial:
                yield await sent("partial_image", event.preview, partial_image_index=number)
                number += 1
        generated: GeneratedImage = task.future.result()
        yield await sent("completed", generated, usage=_usage(prompt_tokens), **describe(generated))
    except Exception as error:
        yield server_sent(api_error(error).body())
    finally:
        task.cancel()


def _usage(prompt_tokens: int) -> dict[str, Any]:
    """The usage that OpenAI's clients expect; only the tokens of the text are counted."""
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": prompt_tokens},
        "output_tokens": 0,
        "total_tokens": prompt_tokens,
    }
