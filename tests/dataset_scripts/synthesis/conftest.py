"""A recipe over Shapes-4o's words, against a server that plays all of its models."""

import copy

import pytest
import yaml

from echo4o.evaluation.benchmarks.shapes4o.scene import COLOURS, SHAPES
from echo4o.testing.openai_server import API_KEY, OpenAIServer
from tests.dataset_scripts.synthesis.artist import Artist, reference


@pytest.fixture(autouse=True)
def of_its_own(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server():
    with OpenAIServer() as server:
        server.artist = Artist().serve(server)
        yield server


@pytest.fixture
def given(tmp_path):
    """Vocabularies, references and a benchmark's prompts, as a person has them."""
    root = tmp_path / "given"
    root.mkdir()
    (root / "objects.txt").write_text("# shapes\n" + "\n".join(SHAPES).replace("cross", "cross|crosses") + "\n")
    (root / "colours.txt").write_text("\n".join(COLOURS) + "\n")
    (root / "benchmark.txt").write_text("a photo of a green bus and a white cloud over seven hills\n")
    for number, shape in enumerate(SHAPES):
        for colour in COLOURS:
            kind = ("person", "object", "scene", "animal")[number % 4]
            path = root / "references" / kind / shape / f"{colour}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(reference(shape, colour, number))
    return root


@pytest.fixture
def values(server, given):
    """The recipe as a mapping, to be changed."""
    picture, words = {"picture": 0.01}, {"input": 1.0, "output": 1.0}
    objects, colours = str(given / "objects.txt"), str(given / "colours.txt")
    return {
        "version": "test-1",
        "models": {
            "text": {"name": "writer", "url": server.url, "price": words},
            "image": {"name": "painter", "url": server.url, "size": "64x64", "price": picture},
            "edit": {"name": "editor", "url": server.url, "size": "64x64", "price": picture},
            "judge": {"name": "judge", "url": server.url, "price": words},
        },
        "rate": {"concurrency": 4, "first_wait": 0.01, "tries": 3},
        "gates": {
            "duplicate_pictures": None,  # Shapes-4o's pictures are alike
            "contamination": {"benchmarks": [], "prompts": [str(given / "benchmark.txt")]},
        },
        "surreal_fantasy": {"rows": 8, "objects": objects, "colours": colours},
        "multi_reference": {"rows": 4, "references": {"path": str(given / "references")}},
        "instruction_following": {"rows": 7, "objects": objects, "colours": colours},
    }


@pytest.fixture
def recipe(values, tmp_path):
    """Writes the recipe with changes, given by dotted names, and returns its file."""

    def write(**changes):
        changed = copy.deepcopy(values)
        for name, value in changes.items():
            section, *keys = changed, *name.split("__")
            for key in keys[:-1]:
                section = section[key]
            section[keys[-1]] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(changed))
        return path

    return write
