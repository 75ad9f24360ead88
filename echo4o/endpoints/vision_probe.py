"""The vision probe: a test image that shows, before anything is judged, whether a model can see.

A model without vision often answers as if it could.
"""

import hashlib
import io
import tempfile
from pathlib import Path

from pydantic import BaseModel, field_validator

from echo4o.endpoints.calls import Caller
from echo4o.endpoints.chat_endpoint import ChatRequest, ImageFile, LabelledImage
from echo4o.endpoints.endpoint import CallFault
from echo4o.endpoints.json_answers import UnreadableAnswer, json_schema, read_json_answer

LEFT, RIGHT = "blue", "yellow"
# The answer is kept by a hash of this text: changing it asks every judge again.
_TEXT = (
    "This is a test picture: its left half has one plain colour, its right half another one. Name both colours in "
    'simple words. Answer with one JSON object and nothing else: {"reason": "...", "left": "...", "right": "..."}'
)


class ProbeColours(BaseModel):
    """The answer to the probe."""

    reason: str
    left: str
    right: str

    @field_validator("left", "right")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.lower()


async def probe_vision(caller: Caller) -> None:
    """Ask for the two colours of a test image; stop the run with a clear message if they are not named."""
    name = caller.endpoint.name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.png"
        path.write_bytes(_probe_image())
        images = (LabelledImage("Picture", ImageFile.read(path)),)
        request = ChatRequest(_TEXT, images=images, schema=json_schema(ProbeColours))
        key = hashlib.sha256(f"probe {caller.endpoint.identity()} {_TEXT}".encode()).hexdigest()
        try:
            answer = await caller.ask(request, key, [])
            seen = read_json_answer(answer, ProbeColours)
        except CallFault as fault:
            if caller.stop.reason is None:
                caller.stop.set(ValueError(f"{name}: {fault} ({fault.kind}); nothing was judged"))
            return
        except UnreadableAnswer as error:
            seen, answered = None, str(error)
        else:
            answered = f'"{seen.left}" and "{seen.right}"'
    if seen is None or LEFT not in seen.left or RIGHT not in seen.right:
        caller.stop.set(
            ValueError(
                f"{name} does not seem to see images: the test image is {LEFT} and {RIGHT}, and it answered {answered}; "
                "a judge needs vision (--no-probe continues anyway)"
            )
        )


def _probe_image() -> bytes:
    from PIL import Image

    image = Image.new("RGB", (128, 64), "#1d3ed6")
    image.paste("#ffd90f", (64, 0, 128, 64))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
