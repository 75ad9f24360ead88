"""Contact sheets: many images, small, with captions, in one image."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from echo4o.common.thumbnails import thumbnail

if TYPE_CHECKING:
    from PIL.Image import Image

_CELL, _CAPTION, _MARGIN = 256, 88, 4  # pixels
_LINE, _LINES = 40, 6  # characters of Pillow's own font that fit into a cell, and lines of a caption


def contact_sheet(
    cells: Sequence[tuple[Path | None, str]], open_image: Callable[[Path], Image], columns: int = 4
) -> Image:
    """The images with their captions, row by row.

    Args:
        cells: the image file (None: a red frame instead) and the caption of each cell.
        open_image: decodes an image file.
    """
    from PIL import Image, ImageDraw

    columns = max(1, min(columns, len(cells)))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * _CELL, rows * (_CELL + _CAPTION)), "white")
    canvas = ImageDraw.Draw(sheet)
    for number, (file, caption) in enumerate(cells):
        x, y = number % columns * _CELL, number // columns * (_CELL + _CAPTION)
        if file is not None:
            small = thumbnail(open_image(file), _CELL - 2 * _MARGIN)
            sheet.paste(small, (x + (_CELL - small.width) // 2, y + _MARGIN))
        else:
            canvas.rectangle((x + _MARGIN, y + _MARGIN, x + _CELL - 5, y + _CELL - 5), outline="red")
        shown = caption.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font can show
        lines = "\n".join(textwrap.wrap(shown, _LINE)[:_LINES])
        canvas.multiline_text((x + 6, y + _CELL), lines, fill="black", spacing=2)
    return sheet
