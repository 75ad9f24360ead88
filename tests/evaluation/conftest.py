"""A small GenEval++ run against a judge on the loopback interface."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from echo4o.testing.openai_server import API_KEY, OpenAIServer

ROOT = Path(__file__).parents[2]


def official(name: str) -> Path:
    """An official prompt file; they are no part of this project."""
    folder = Path(os.environ.get("ECHO4O_BENCHMARKS") or ROOT.parent / "shared" / "benchmarks")
    if not (folder / name).is_file():
        pytest.skip(f"{name} is not here: the official prompts are no part of this project (ECHO4O_BENCHMARKS)")
    return folder / name


@pytest.fixture(autouse=True)
def of_its_own(monkeypatch, tmp_path):
    """A key that the loopback judge knows, a cache of the test's own, and no endpoint of the user's."""
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    monkeypatch.setenv("ECHO4O_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server():
    with OpenAIServer() as server:
        server.verdict = even_is_correct
        yield server


def even_is_correct(call) -> dict:
    """Pictures carry their number in their first pixel: the even ones are right."""
    number = call.open_image().getpixel((0, 0))[0]
    return {"reason": f"picture {number}", "correct": int(number % 2 == 0)}


def write_prompts(path: Path, count: int = 8) -> Path:
    """Prompts in the form of GenEval++: two tags in turn, so that one tag is all right and the other all wrong."""
    rows = []
    for number in range(1, count + 1):
        tag = "counting" if number % 2 else "color_attr"
        rows.append(
            {"tag": tag, "include": [{"class": "cup", "count": 4}], "prompt": f"A photo of cups, number {number}"}
        )
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_pictures(folder: Path, count: int = 8, suffix: str = ".png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 90)).save(folder / f"{number}{suffix}")
    return folder


@pytest.fixture
def prompts(tmp_path) -> Path:
    return write_prompts(tmp_path / "prompts.jsonl")


@pytest.fixture
def pictures(tmp_path) -> Path:
    return write_pictures(tmp_path / "pictures")
