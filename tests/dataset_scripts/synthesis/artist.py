"""Plays the three models of a recipe with Shapes-4o: writes what it is asked for, draws what it reads, and sees what it is shown."""

import io
import json
import re

from PIL import Image

from echo4o.evaluation.benchmarks.shapes4o.detector import check, detect
from echo4o.evaluation.benchmarks.shapes4o.rendering import png, render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import COLOURS, SHAPES, TYPICAL_COLOUR, ShapeGroup, lay_out

NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8}
REGIONS = {"left": "left", "right": "right", "top": "above", "bottom": "below"}
_PHRASE = re.compile(
    rf"\b({'|'.join(NUMBERS)}) (?:(larger|smaller) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})(?:e?s)?\b"
    rf"(?: (?:on|at) the ({'|'.join(REGIONS)}))?"
)
_SIZES = {"larger": "large", "smaller": "small"}


def groups_in(text: str) -> list[ShapeGroup]:
    """The things that an instruction asks for."""
    return [
        ShapeGroup(shape, colour or None, NUMBERS[number], REGIONS.get(region), _SIZES.get(size))
        for number, size, colour, shape, region in _PHRASE.findall(text.lower())
    ]


class Artist:
    """What a server says, draws and judges. `wrong`: texts whose first pictures are wrong, with how many of them."""

    def __init__(self):
        self.painted = 0
        self.wrong: dict[str, int] = {}
        self.sloppy = 0  # paraphrases that lose the structure, from now on

    def serve(self, server) -> "Artist":
        server.image, server.text, server.verdict = self.paint, self.write, self.verdict
        server.models = ["writer", "painter", "editor", "judge"]
        return self

    def paint(self, call) -> bytes:
        self.painted += 1
        background = tint(self.painted)
        for text, left in self.wrong.items():
            if left and text in call.text:
                self.wrong[text] -= 1
                return png(render((), background))
        if call.kind == "edit":
            return png(_joined(call.images))
        return png(render(lay_out(groups_in(call.text)), background))

    def write(self, call) -> str:
        text = call.text
        if "Name what everybody knows" in text:
            (thing,) = re.findall(r"about this thing: (.+)", text)
            known = dict.fromkeys(("shape", "size", "material", "surroundings", "time"), "plain")
            return f"Gladly: {json.dumps(known | {'colour': TYPICAL_COLOUR.get(thing, 'grey')})}"
        if "The break:" in text:
            (note,) = re.findall(r"The break: (.+)", text)
            return f'"On one sheet of paper, {note}."'
        instruction = text.split("\n\n")[1]
        if "image editor" in text:
            return f"Please do this: {instruction}"
        if self.sloppy:
            self.sloppy -= 1
            return "Some things on a plain wall."
        return f"Here, seen from the front: {instruction[0].lower()}{instruction[1:]}."

    def verdict(self, call) -> dict:
        """Looks at the pixels: exactly what the instruction asks for, and nothing else."""
        if "image 1" in call.text:
            colours = sorted(thing.colour for image in call.images[:-1] for thing in detect(_opened(image)))
            found = sorted(thing.colour for thing in detect(_opened(call.images[-1])))
            return {"reason": f"{found} of {colours}", "correct": int(found == colours and bool(found))}
        (instruction,) = re.findall(r"made from this instruction:\n\n(.+)", call.text)
        right, reasons = check(groups_in(instruction), detect(call.open_image()))
        return {"reason": "; ".join(reasons) or "as asked", "correct": int(right)}


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _joined(references) -> Image.Image:
    """One thing of every reference, side by side: as a model does that looked at its inputs."""
    things = [detect(_opened(data))[0] for data in references]
    return render(lay_out([ShapeGroup(thing.shape, thing.colour) for thing in _apart(things)]), tint(len(references)))


def _apart(things):
    """Equal shapes and colours stand in one group in Shapes-4o's layout: none of them may be lost."""
    return things[:4]


def reference(shape: str, colour: str, number: int) -> bytes:
    return png(render(lay_out([ShapeGroup(shape, colour)]), tint(number)))
