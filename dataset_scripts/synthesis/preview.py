"""Writes a contact sheet of the first rows, to look at before the others are paid for."""

from collections.abc import Sequence
from pathlib import Path

from echo4o.common.contact_sheet import contact_sheet
from echo4o.dataset_scripts.synthesis.folder import PREVIEW, SynthesisFolder
from echo4o.dataset_scripts.synthesis.rows import PlannedRow
from echo4o.modeling.common.image_files import open_image


def first_tasks(tasks: Sequence[PlannedRow], count: int) -> list[PlannedRow]:
    """Returns the first rows, from all parts in turn."""
    ordered = sorted(tasks, key=lambda task: (task.number, task.part))
    return ordered[:count]


def write_preview(folder: SynthesisFolder, tasks: Sequence[PlannedRow]) -> Path:
    """Writes the images of the rows with their instructions; a rejected row shows its reason."""
    path = folder.path / PREVIEW
    contact_sheet([_cell(folder, task) for task in tasks], open_image).save(path, "PNG")
    return path


def _cell(folder: SynthesisFolder, task: PlannedRow) -> tuple[Path | None, str]:
    if task.id in folder.accepted:
        return folder.image_of(task.id), folder.accepted[task.id]["instruction"]
    rejection = folder.rejected.get(task.id)
    return None, f"{rejection['reason']}: {rejection['detail']}" if rejection else "not decided yet"
