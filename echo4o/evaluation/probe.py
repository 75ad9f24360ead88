"""Before the first judgement: can the judge see? A model without vision often answers as if it could."""

import io
import tempfile
from pathlib import Path

from pydantic import field_validator

from echo4o.evaluation.benchmarks.base import Verdict
from echo4o.evaluation.calls import Caller
from echo4o.evaluation.judges.base import JudgeFault, Question, Shown
from echo4o.evaluation.judges.reading import Unreadable, read_verdict
from echo4o.evaluation.pictures import Picture

LEFT, RIGHT = "blue", "yellow"
_TEXT = (
    "This is a test picture: its left half has one plain colour, its right half another one. Name both colours in "
    'simple words. Answer with one JSON object and nothing else: {"reason": "...", "left": "...", "right": "..."}'
)


class Colours(Verdict):
    left: str
    right: str

    @field_validator("left", "right")
    @classmethod
    def _lower(cls, value: str) -> str:
        return value.lower()


async def look_at_probe(caller: Caller) -> None:
    """Ask for the colours of a picture of two halves; stops the run with a clear message if they are not named."""
    import hashlib

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.png"
        path.write_bytes(_draw())
        question = Question("", _TEXT, (Shown("Picture", Picture.read(path)),), Colours)
        key = hashlib.sha256(f"probe {caller.judge.identity()} {_TEXT}".encode()).hexdigest()
        faults: list[dict] = []
        try:
            answer = await caller.ask(question, key, faults)
            seen = read_verdict(answer, Colours)
        except JudgeFault as fault:
            if caller.stop.reason is None:
                caller.stop.set(ValueError(f"{caller.judge.name}: {fault} ({fault.kind}); nothing was judged"))
            return
        except Unreadable as error:
            seen, said = None, str(error)
        else:
            said = f'"{seen.left}" and "{seen.right}"'
    if seen is None or LEFT not in seen.left or RIGHT not in seen.right:
        caller.stop.set(
            ValueError(
                f"{caller.judge.name} does not seem to see pictures: a test picture is {LEFT} and {RIGHT}, and it said "
                f"{said}; a judge needs vision (--no-probe goes on anyway)"
            )
        )


def _draw() -> bytes:
    from PIL import Image

    picture = Image.new("RGB", (128, 64), "#1d3ed6")
    picture.paste("#ffd90f", (64, 0, 128, 64))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return data.getvalue()
