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
from echo4o.endpoints.endpoint import CallFault, ModelAnswer
from echo4o.endpoints.json_answers import UnreadableAnswer, is_readable, json_schema, read_json_answer

LEFT, RIGHT = "blue", "yellow"
# The answer is kept by a hash of this text: changing it asks every judge again.
_TEXT = (
    "This is a test picture: its left half has one plain colour, its right half another one. Name both colours in "
    'simple words. Answer with one JSON object and nothing else: {"reason": "...", "left": "...", "right": "..."}'
)

_ADVICE = {
    "cut_off": "; give it more room with --max-tokens (models.judge.max_tokens in a recipe): reasoning counts, too",
    "empty": "; a model that reasons may need more room: --max-tokens (models.judge.max_tokens in a recipe)",
}


class ProbeColours(BaseModel):
    """The answer to the probe."""

    reason: str
    left: str
    right: str

    @field_validator("left", "right")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.lower()

    @property
    def is_right(self) -> bool:
        return LEFT in self.left and RIGHT in self.right


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
            answer = await caller.ask(request, key, [], _sees)
        except CallFault as fault:
            if caller.stop.reason is None:
                caller.stop.set(ValueError(f"{name}: {fault} ({fault.kind}); nothing was judged"))
            return
    try:
        seen = read_json_answer(answer, ProbeColours)
    except UnreadableAnswer as error:
        advice = _ADVICE.get(error.kind, "")
        caller.stop.set(
            ValueError(
                f"{name}: its answer to the test image cannot be used, so whether it sees images is not known: "
                f"{error} ({error.kind}){advice}; nothing was judged (--no-probe continues anyway)"
            )
        )
        return
    if not seen.is_right:
        caller.stop.set(
            ValueError(
                f"{name} does not seem to see images: the test image is {LEFT} and {RIGHT}, and it answered "
                f'"{seen.left}" and "{seen.right}"; a judge needs vision (--no-probe continues anyway)'
            )
        )


def _sees(answer: ModelAnswer) -> bool:
    """Only the answer of a judge that sees is kept: a server may be given vision later."""
    return is_readable(answer, ProbeColours) and read_json_answer(answer, ProbeColours).is_right


def _probe_image() -> bytes:
    from PIL import Image

    image = Image.new("RGB", (128, 64), "#1d3ed6")
    image.paste("#ffd90f", (64, 0, 128, 64))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
