"""Rendering: deterministic bytes in the upstream layout."""

import json
import tarfile
from collections import Counter

import numpy as np
import pytest

from echo4o.evaluation.benchmarks.shapes4o.grammar import TAGS
from echo4o.evaluation.benchmarks.shapes4o.rendering import png, render, tint
from echo4o.evaluation.benchmarks.shapes4o.scene import SceneObject
from echo4o.evaluation.benchmarks.shapes4o.upstream_release import render_upstream, sample

ROWS = {"surreal_fantasy": 12, "multi_reference": 6, "instruction_following": 25}


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_arguments_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        render_upstream(tmp_path / name, ROWS, seed=seed, rows_per_archive=10)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    assert _bytes(tmp_path / "a") != _bytes(tmp_path / "c")


def test_upstream_layout(tmp_path):
    assert render_upstream(tmp_path, ROWS, rows_per_archive=10) == ROWS
    folder = tmp_path / "Instruction-Following-Image"
    archives = sorted(p.name for p in (folder / "images").iterdir())
    assert archives == ["0-10.tar.gz", "10-20.tar.gz", "20-25.tar.gz"]
    rows = [json.loads(line) for line in (folder / "Instruction-Following-Image.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"task_type", "instruction", "output_image", "type"}
    assert {row["type"] for row in rows} == set(TAGS) - {"surreal", "multi_reference"}
    members = [name for a in archives for name in tarfile.open(folder / "images" / a).getnames()]
    assert members == ["images/" + row["output_image"].rpartition("/")[2] for row in rows]


def test_references_are_in_the_archive(tmp_path):
    render_upstream(tmp_path, {"multi_reference": 3})
    folder = tmp_path / "Multi-Reference-Image"
    row = json.loads((folder / "Multi-Reference-Image.jsonl").read_text().splitlines()[1])
    names = {name.rpartition("/")[2] for name in tarfile.open(folder / "images" / "0-3.tar.gz").getnames()}
    assert {path.rpartition("/")[2] for path in row["input_images"]} == {"00001_1.png", "00001_2.png"} <= names


def test_a_row_does_not_depend_on_the_others():
    one = sample("instruction_following", 17, seed=3)
    assert one == sample("instruction_following", 17, seed=3) != sample("instruction_following", 17, seed=4)


def test_no_two_rows_are_duplicates():
    assert len({tint(index) for index in range(2197)}) == 2197
    rows = [sample("surreal_fantasy", index) for index in range(600)]
    pictures = Counter((row.prompt.text, png(render(row.image, row.background))) for row in rows)
    assert max(pictures.values()) == 1


def test_images_are_anti_aliased_on_a_plain_background():
    pixels = np.asarray(render([SceneObject("circle", "blue", 1, 2)], (240, 244, 248)))
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:16] == (240, 244, 248)).all() and (pixels[24, 40] == (44, 76, 200)).all()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) >= 8  # edges have shades of their own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": {"poems": 3}}, "'poems': 3; allowed are surreal_fantasy"),
        ({"rows": {"surreal_fantasy": 0}}, "'surreal_fantasy': 0"),
        ({"layout": "grid"}, "layout is 'grid'; allowed are prompt, free"),
        ({"rows_per_archive": 0}, "rows_per_archive is 0"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        render_upstream(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
