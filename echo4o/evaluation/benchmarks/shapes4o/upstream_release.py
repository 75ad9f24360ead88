"""Writes Shapes-4o, a miniature of Echo-4o-Image, in the upstream release's layout."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echo4o.evaluation.benchmarks.shapes4o.grammar import PARTS, ShapesPrompt, tags_of, training_prompt
from echo4o.evaluation.benchmarks.shapes4o.rendering import png, render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import BACKGROUND, LAYOUTS, SceneObject, lay_out, lay_out_reference

ROWS = {"surreal_fantasy": 900, "multi_reference": 1500, "instruction_following": 6000}


@dataclass(frozen=True)
class _Folder:
    """The folder of a part in the upstream release."""

    name: str
    rows_file: str
    task_type: str


# "Surrel" is the spelling of the release. The names of the multi-reference part are not known from it and chosen here.
_FOLDERS = {
    "surreal_fantasy": _Folder("Surrel-Fantasy-Image", "conflict.jsonl", "t2i"),
    "multi_reference": _Folder("Multi-Reference-Image", "Multi-Reference-Image.jsonl", "multi_reference"),
    "instruction_following": _Folder("Instruction-Following-Image", "Instruction-Following-Image.jsonl", "t2i"),
}


@dataclass(frozen=True)
class ShapesRow:
    """A row of Shapes-4o: its prompt, the objects of its image and of its reference images, and the background."""

    prompt: ShapesPrompt
    image: tuple[SceneObject, ...]
    references: tuple[tuple[SceneObject, ...], ...] = ()
    background: tuple[int, int, int] = BACKGROUND


def sample(part: str, index: int, seed: int = 0, layout: str = "prompt") -> ShapesRow:
    """Returns row ``index`` of a part: deterministic, and never with held-out content.

    A short prompt has few possible images ("two stars" has one in the layout "prompt"). Each row therefore has its own
    background, so that no two rows are duplicates.

    Args:
        part: "surreal_fantasy", "multi_reference" or "instruction_following".
        index: From 0; the tags of the part are used in turn.
        seed: Another seed gives another dataset.
        layout: "prompt", in which the prompt determines every cell, or "free" (see :func:`.scene.lay_out`).
    """
    tags = tags_of(part)
    rng = np.random.default_rng([seed, PARTS.index(part), index])
    prompt = training_prompt(tags[index % len(tags)], rng)
    references = tuple(lay_out_reference(group, layout, rng) for group in prompt.references)
    return ShapesRow(prompt, lay_out(prompt.groups, layout, rng), references, tint(index))


def render_upstream(
    out_dir: str | Path,
    rows: Mapping[str, int] = ROWS,
    seed: int = 0,
    layout: str = "prompt",
    rows_per_archive: int = 5000,
) -> dict[str, int]:
    """Writes Shapes-4o in the layout of the upstream release: JSON lines and tar.gz archives of PNG images.

    The same arguments give the same bytes. No row has held-out content.

    Args:
        out_dir: Created if it is missing. Files of an earlier run are overwritten.
        rows: Number of rows by part; other parts are not written.
        seed, layout: See :func:`sample`.
        rows_per_archive: Archives are named by their rows, as in ``0-5000.tar.gz``.

    Returns:
        The number of rows by part.

    Raises:
        ValueError: an unknown part or layout, or a number of rows below 1.
    """
    for part, number in rows.items():
        if part not in PARTS or number < 1:
            raise ValueError(f"rows has {part!r}: {number!r}; allowed are {', '.join(PARTS)} with 1 row or more")
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; allowed are {', '.join(LAYOUTS)}")
    if rows_per_archive < 1:
        raise ValueError(f"rows_per_archive is {rows_per_archive!r}; it must be 1 or more")
    for part, number in rows.items():
        folder = Path(out_dir) / _FOLDERS[part].name
        (folder / "images").mkdir(parents=True, exist_ok=True)
        with (folder / _FOLDERS[part].rows_file).open("w", encoding="utf-8", newline="\n") as lines:
            for start in range(0, number, rows_per_archive):
                stop = min(start + rows_per_archive, number)
                samples = [sample(part, index, seed, layout) for index in range(start, stop)]
                _write_archive(folder / "images" / f"{start}-{stop}.tar.gz", _members(start, samples))
                lines.writelines(_row(part, start + i, row) + "\n" for i, row in enumerate(samples))
    return dict(rows)


def _row(part: str, index: int, row: ShapesRow) -> str:
    """Returns the line of a row in the file of its part."""
    images = f"/Echo-4o-Image/{_FOLDERS[part].name}/images"
    fields: dict[str, str | list[str]] = {"task_type": _FOLDERS[part].task_type, "instruction": row.prompt.text}
    if row.references:
        fields["input_images"] = [f"{images}/{name}" for name in _reference_names(index, row)]
    return json.dumps(fields | {"output_image": f"{images}/{index:05d}.png", "type": row.prompt.tag})


def _reference_names(index: int, row: ShapesRow) -> list[str]:
    return [f"{index:05d}_{number}.png" for number in range(1, len(row.references) + 1)]


def _members(start: int, samples: Iterable[ShapesRow]) -> Iterator[tuple[str, bytes]]:
    for index, row in enumerate(samples, start):
        for name, objects in zip(_reference_names(index, row), row.references):
            yield name, png(render(objects, row.background))
        yield f"{index:05d}.png", png(render(row.image, row.background))


def _write_archive(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Writes a tar.gz without times and owners, so that equal members give equal bytes."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as zipped:
        with tarfile.open(mode="w|", fileobj=zipped, format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members:
                info = tarfile.TarInfo(f"images/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
