"""A contact sheet: what the first rows look like, before the others are paid for."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from echo4o.common.thumbnails import thumbnail
from echo4o.dataset_scripts.synthesis.folder import PREVIEW, SynthesisFolder
from echo4o.dataset_scripts.synthesis.rows import PlannedRow

_CELL, _TEXT, _COLUMNS = 256, 88, 4


def first_tasks(tasks: Sequence[PlannedRow], count: int) -> list[PlannedRow]:
    """The first rows of every part in turn."""
    ordered = sorted(tasks, key=lambda task: (task.number, task.part))
    return ordered[:count]


def contact_sheet(folder: SynthesisFolder, tasks: Sequence[PlannedRow]) -> Path:
    """Write the pictures of the rows with their instructions; a rejected row shows its reason."""
    rows = -(-len(tasks) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _CELL, rows * (_CELL + _TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, task in enumerate(tasks):
        x, y = place % _COLUMNS * _CELL, place // _COLUMNS * (_CELL + _TEXT)
        if task.id in folder.accepted:
            small = thumbnail(folder.picture_of(task.id), _CELL - 8)
            sheet.paste(small, (x + (_CELL - small.width) // 2, y + 4))
            text = folder.accepted[task.id]["instruction"]
        else:
            draw.rectangle((x + 4, y + 4, x + _CELL - 5, y + _CELL - 5), outline="red")
            told = folder.rejected.get(task.id)
            text = f"{told['reason']}: {told['detail']}" if told else "not made yet"
        text = text.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font can show
        draw.multiline_text((x + 6, y + _CELL), "\n".join(textwrap.wrap(text, 40)[:6]), fill="black", spacing=2)
    path = folder.path / PREVIEW
    sheet.save(path, "PNG")
    return path
