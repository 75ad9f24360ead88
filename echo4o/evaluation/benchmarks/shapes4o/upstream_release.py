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
    """Where the upstream release keeps one part."""

    name: str
    rows_file: str
    task_type: str


# The spelling "Surrel" is upstream's. The multi-reference part's names are not confirmed there: these are ours.
_FOLDERS = {
    "surreal_fantasy": _Folder("Surrel-Fantasy-Image", "conflict.jsonl", "t2i"),
    "multi_reference": _Folder("Multi-Reference-Image", "Multi-Reference-Image.jsonl", "multi_reference"),
    "instruction_following": _Folder("Instruction-Following-Image", "Instruction-Following-Image.jsonl", "t2i"),
}


@dataclass(frozen=True)
class ShapesRow:
    """One row of Shapes-4o: what is asked, what is shown beside it, and the picture that answers."""

    prompt: ShapesPrompt
    picture: tuple[SceneObject, ...]
    references: tuple[tuple[SceneObject, ...], ...] = ()
    background: tuple[int, int, int] = BACKGROUND


def sample(part: str, index: int, seed: int = 0, layout: str = "prompt") -> ShapesRow:
    """Row ``index`` of a part: the same for the same arguments, and never a held-out content.

    Few words have only a handful of pictures ("two stars" has one where the words decide the layout), so each row has
    a background of its own: rows are alike but no duplicates.

    Args:
        part: "surreal_fantasy", "multi_reference" or "instruction_following".
        index: From 0; the part's tags take turns.
        seed: Another seed is another data set.
        layout: "prompt", where the words decide every cell, or "free" (see :func:`.scene.lay_out`).
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
    """Writes Shapes-4o as the upstream release is laid out: JSON lines beside tar.gz archives of PNG pictures.

    The same arguments give the same bytes. Nothing held out is among the rows.

    Args:
        out_dir: Made where it is missing. Its files of an earlier run are overwritten.
        rows: How many rows of which part; parts that are not named are not written.
        seed, layout: See :func:`sample`.
        rows_per_archive: Archives are named by the rows they hold, as in ``0-5000.tar.gz``.

    Returns:
        The rows written, by part.

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
                lines.writelines(_row(part, start + i, of) + "\n" for i, of in enumerate(samples))
    return dict(rows)


def _row(part: str, index: int, of: ShapesRow) -> str:
    images = f"/Echo-4o-Image/{_FOLDERS[part].name}/images"
    row = {"task_type": _FOLDERS[part].task_type, "instruction": of.prompt.text}
    if of.references:
        row["input_images"] = [f"{images}/{name}" for name in _reference_names(index, of)]
    return json.dumps(row | {"output_image": f"{images}/{index:05d}.png", "type": of.prompt.tag})


def _reference_names(index: int, of: ShapesRow) -> list[str]:
    return [f"{index:05d}_{number}.png" for number in range(1, len(of.references) + 1)]


def _members(start: int, samples: Iterable[ShapesRow]) -> Iterator[tuple[str, bytes]]:
    for index, of in enumerate(samples, start):
        for name, objects in zip(_reference_names(index, of), of.references):
            yield name, png(render(objects, of.background))
        yield f"{index:05d}.png", png(render(of.picture, of.background))


def _write_archive(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar.gz without clocks or owners in it, so that equal members give equal bytes."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as zipped:
        with tarfile.open(mode="w|", fileobj=zipped, format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members:
                info = tarfile.TarInfo(f"images/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
