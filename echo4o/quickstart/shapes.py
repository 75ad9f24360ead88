"""Draws Shapes-4o, a miniature of Echo-4o-Image, and writes it in the upstream release's layout."""

import gzip
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from echo4o.quickstart.prompts import PARTS, Prompt, tags_of, training_prompt
from echo4o.quickstart.scene import (
    BACKGROUND,
    CELL,
    COLOURS,
    LAYOUTS,
    PICTURE,
    SHAPES,
    SIZES,
    SceneObject,
    lay_out,
    lay_out_reference,
)

_SUPERSAMPLE = 8
_TINTS = 13  # per colour channel

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


def draw(objects: Iterable[SceneObject], background: tuple[int, int, int] = BACKGROUND) -> Image.Image:
    """Draws the objects, anti-aliased, on a plain background: an RGB picture of 64 x 64 pixels."""
    canvas = np.empty((PICTURE, PICTURE, 3), np.float32)
    canvas[:] = background
    for thing in objects:
        alpha = coverage(thing.shape, thing.size)[..., None]
        cell = canvas[thing.row * CELL : (thing.row + 1) * CELL, thing.column * CELL : (thing.column + 1) * CELL]
        cell += alpha * (np.asarray(COLOURS[thing.colour], np.float32) - cell)
    return Image.fromarray((canvas + 0.5).astype(np.uint8))


def tint(index: int) -> tuple[int, int, int]:
    """A light background near BACKGROUND: 2197 different ones, then again from the first."""
    steps = index * 1000 % _TINTS**3  # 1000 shares no divisor with 13, so every tint is met once in a round
    return tuple(base - _TINTS // 2 + steps // _TINTS**axis % _TINTS for axis, base in enumerate(BACKGROUND))


@lru_cache(maxsize=len(SHAPES) * len(SIZES))
def coverage(shape: str, size: str) -> np.ndarray:
    """How much of each pixel of a cell the shape covers: float32 (16, 16) in [0, 1], read-only."""
    steps = CELL * _SUPERSAMPLE
    axis = ((np.arange(steps) + 0.5) / _SUPERSAMPLE - CELL / 2) / (SIZES[size] / 2)
    inside = _INSIDE[shape](axis[None, :], -axis[:, None])
    inside = np.broadcast_to(inside, (steps, steps)).astype(np.float32)
    alpha = inside.reshape(CELL, _SUPERSAMPLE, CELL, _SUPERSAMPLE).mean((1, 3))
    alpha.flags.writeable = False
    return alpha


def _circle(x, y):
    return x**2 + y**2 <= 1


def _square(x, y):
    return np.maximum(abs(x), abs(y)) <= 0.9


def _triangle(x, y):
    return (y >= -0.9) & (abs(x) <= (0.95 - y) / 1.85)


def _cross(x, y):
    return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1)


def _heart(x, y):
    y = 1.12 * y + 0.2
    return x**2 + (y - 0.7 * np.sqrt(abs(x))) ** 2 <= 1


def _star(x, y):
    # Folded into the wedge between a tip (angle 0, radius 1) and its notch (angle pi / 5, radius 0.45): one edge.
    radius = np.hypot(x, y + 0.05)
    angle = np.arctan2(x, y + 0.05) % (2 * np.pi / 5)
    angle = np.minimum(angle, 2 * np.pi / 5 - angle)
    edge = 0.45 * np.exp(1j * np.pi / 5) - 1
    tip_to_point = radius * np.exp(1j * angle) - 1
    return edge.real * tip_to_point.imag - edge.imag * tip_to_point.real >= 0


_INSIDE = {
    "heart": _heart,
    "star": _star,
    "triangle": _triangle,
    "cross": _cross,
    "circle": _circle,
    "square": _square,
}


# --- the upstream layout ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One row of Shapes-4o: what is asked, what is shown beside it, and the picture that answers."""

    prompt: Prompt
    picture: tuple[SceneObject, ...]
    references: tuple[tuple[SceneObject, ...], ...] = ()
    background: tuple[int, int, int] = BACKGROUND


def sample(part: str, index: int, seed: int = 0, layout: str = "prompt") -> Sample:
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
    return Sample(prompt, lay_out(prompt.groups, layout, rng), references, tint(index))


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


def _row(part: str, index: int, of: Sample) -> str:
    images = f"/Echo-4o-Image/{_FOLDERS[part].name}/images"
    row = {"task_type": _FOLDERS[part].task_type, "instruction": of.prompt.text}
    if of.references:
        row["input_images"] = [f"{images}/{name}" for name in _reference_names(index, of)]
    return json.dumps(row | {"output_image": f"{images}/{index:05d}.png", "type": of.prompt.tag})


def _reference_names(index: int, of: Sample) -> list[str]:
    return [f"{index:05d}_{number}.png" for number in range(1, len(of.references) + 1)]


def _members(start: int, samples: Iterable[Sample]) -> Iterator[tuple[str, bytes]]:
    for index, of in enumerate(samples, start):
        for name, objects in zip(_reference_names(index, of), of.references):
            yield name, png(draw(objects, of.background))
        yield f"{index:05d}.png", png(draw(of.picture, of.background))


def png(picture: Image.Image) -> bytes:
    """The picture as PNG bytes, the same every time."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _write_archive(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """A tar.gz without clocks or owners in it, so that equal members give equal bytes."""
    with path.open("wb") as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as zipped:
        with tarfile.open(mode="w|", fileobj=zipped, format=tarfile.USTAR_FORMAT) as archive:
            for name, data in members:
                info = tarfile.TarInfo(f"images/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
