"""Writes a strip of the quickstart's images: the first held-out prompt of each tag, before and after fine-tuning.

``python -m echo4o.quickstart.image_strip quickstart docs/images/quickstart.png`` made the strip of the README from the
folder of a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from echo4o.evaluation.benchmarks.shapes4o.grammar import TAGS
from echo4o.quickstart.generation import reference_images_of
from echo4o.quickstart.run import chosen_prompts

SIDE = 128  # pixels of an image
GAP = 8
TITLE = 88  # pixels of the column with the titles of the rows
CAPTION = 62  # pixels of the row with the prompts
REFERENCE = 40  # pixels of a reference image


def image_strip(run: Path, per_tag: int = 10) -> Image.Image:
    """Returns the strip.

    Args:
        run: the folder of a quickstart.
        per_tag: prompts of each tag in that run.
    """
    prompts = chosen_prompts(per_tag)
    font = ImageFont.load_default(13)
    width = TITLE + len(TAGS) * (SIDE + GAP)
    strip = Image.new("RGB", (width, CAPTION + 2 * (SIDE + GAP)), "white")
    pen = ImageDraw.Draw(strip)
    for column in range(len(TAGS)):
        prompt, left = prompts[column * per_tag], TITLE + column * (SIDE + GAP)
        if prompt.references:
            for number, reference in enumerate(reference_images_of(prompt)):
                place = (left + number * (REFERENCE + GAP), CAPTION - REFERENCE - GAP)
                strip.paste(reference.resize((REFERENCE, REFERENCE), Image.Resampling.LANCZOS), place)
            text = "1 beside 2:"
        else:
            text = _wrapped(prompt.text.removeprefix("a photo of "), font)
        pen.multiline_text((left, 0), text, "black", font, spacing=2)
        for row, when in enumerate(("before", "after")):
            with Image.open(run / "evaluation" / when / "images" / f"{column * per_tag + 1}.png") as image:
                larger = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            strip.paste(larger, (left, CAPTION + row * (SIDE + GAP)))
    for row, title in enumerate(("imperfect\ncaptions", "+ clean\nsynthetic\nrows")):
        pen.multiline_text((0, CAPTION + row * (SIDE + GAP) + SIDE // 3), title, "black", font, spacing=2)
    return strip


def _wrapped(text: str, font) -> str:
    """Breaks the text into lines that are not wider than an image."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > SIDE:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def main(run: str, out: str) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    image_strip(Path(run)).quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
