"""Example inputs of the app."""

import tempfile
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw

PROMPTS = [
    "A lighthouse made of glass on a cliff, at dawn",
    "Three red apples and two green pears on a wooden table",
    "A fox made of clouds jumps over a small village",
]
# (number of example images, instruction)
EDIT_EXAMPLES = [(1, "Make it night"), (2, "Put both on a wooden table")]
_FOLDER = tempfile.TemporaryDirectory(prefix="echo4o-examples-", ignore_cleanup_errors=True)


@cache
def example_files() -> list[str]:
    """Two simple images, drawn once: a red circle and a blue square."""
    files = []
    for name, colour in (("circle", "#c8402c"), ("square", "#2c56c8")):
        image = Image.new("RGB", (512, 512), "#f2efe8")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if name == "circle" else draw.rectangle)((136, 136, 376, 376), fill=colour)
        file = Path(_FOLDER.name, f"{name}.png")
        image.save(file)
        files.append(str(file))
    return files
