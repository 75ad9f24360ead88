"""docs/synthesis.md: its commands are run in its order, as a person does, and its numbers are the plan's."""

import json
import os
import random
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import get_args

import openai.types
import openai.types.shared
import pytest
from PIL import Image

from echo4o.dataset_scripts.synthesis.gates import GateReason
from echo4o.dataset_scripts.synthesis.plan import make_plan
from echo4o.dataset_scripts.synthesis.recipe import load_recipe
from echo4o.dataset_scripts.synthesis.tasks import load_chains, make_tasks
from echo4o.evaluation.benchmarks.shapes4o.rendering import png
from echo4o.testing.openai_server import API_KEY
from tests.dataset_scripts.synthesis.artist import reference
from tests.test_readme import BLOCK, EXAMPLE

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "synthesis.md").read_text("utf-8")
RECIPE = next(code for language, code in BLOCK.findall(GUIDE) if language == "yaml" and "version:" in code)

# What the guide's commands meet: `echo4o` with prompts to compare with that need no network.
ECHO4O = f"""#!{sys.executable}
import sys
from pathlib import Path
from echo4o.evaluation.benchmarks import prompt_files
prompt_files.fetch_official = lambda benchmark, revision=None: Path(f"{{benchmark.name}}.jsonl")
from echo4o.cli import main
main()
"""
PROMPTS = {
    "genevalpp": {"prompt": "seven hills", "tag": "counting", "include": [{"class": "hill", "count": 7}]},
    "imagine_bench": {"id": 1, "instruction": "a grey cloud of glass", "note": "glass", "type": "MATERIAL"},
}


def test_every_command_is_run():
    commands = [code for language, code in BLOCK.findall(GUIDE) if language == "bash"]
    run = [code for _, code in EXAMPLE.findall(GUIDE)]
    assert GUIDE.count("<!-- test -->") == len(run) == 4
    assert [code for code in commands if code not in run] == ["export OPENAI_API_KEY=...\n"]


def test_the_numbers_are_those_of_the_plan_with_the_prices_in_the_recipe():
    recipe = load_recipe("first_hundred")
    plan = make_plan(recipe, make_tasks(recipe, load_chains(recipe)))
    stated = f"about {plan.cost():.2f} USD if every answer passes at once, {plan.cost(most=True):.2f} USD at most"
    assert stated in GUIDE and sum(plan.rows.values()) == 100
    assert f"{plan.seconds() / 60:.0f} to {plan.seconds(most=True) / 60:.0f} minutes" in GUIDE
    assert all(f"`{reason}`" in GUIDE for reason in GateReason)


def test_the_models_are_those_that_the_installed_client_knows():
    for recipe in (load_recipe("first_hundred"), _written(RECIPE)):
        models = recipe.models
        assert models.image.name in get_args(openai.types.ImageModel)
        assert {models.text.name, models.judge.name} <= set(get_args(openai.types.shared.ChatModel))
        assert models.image.name not in ("gpt-image-1", "dall-e-2", "dall-e-3"), "these are shut down"


def _written(text: str):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path)


def _picture(call) -> bytes:
    """1024 x 1024, and no two alike."""
    small = Image.frombytes("RGB", (8, 8), random.Random(call.text).randbytes(192))
    return png(small.resize((1024, 1024), Image.Resampling.NEAREST))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_from_a_key_to_a_hundred_rows(server, tmp_path):
    recipe = load_recipe("first_hundred")
    server.models = [recipe.models.text.name, recipe.models.image.name]
    server.image, server.verdict = _picture, lambda call: {"reason": "as asked", "correct": 1}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "echo4o").write_text(ECHO4O)
    (tmp_path / "bin" / "echo4o").chmod(stat.S_IRWXU)
    for name, prompt in PROMPTS.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(prompt) + "\n")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    (tmp_path / "coco_names.txt").write_text(
        "cup\nbus\nhorse\nsheep|sheep\n" + "".join(f"toy {c}\n" for c in "abcdef")
    )
    for kind in ("person", "object", "scene", "animal"):
        (tmp_path / "my_pictures" / kind).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "my_pictures" / kind / f"{number}.png").write_bytes(reference("star", "red", number))
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OPENAI_BASE_URL": server.url, "OPENAI_API_KEY": API_KEY}
    said = []
    for number, (_, script) in enumerate(EXAMPLE.findall(GUIDE)):
        given = {name: value for name, value in environment.items() if number or not name.startswith("OPENAI")}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=given, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        said.append(done.stdout + done.stderr)
    assert "12 rows planned, 12 accepted" in said[1] and (tmp_path / "made" / "preview.png").is_file()
    assert "100 rows planned, 100 accepted" in said[2]
    manifest = json.loads((tmp_path / "made-built" / "manifest.json").read_text())
    assert manifest["rows"]["accepted"] == 100
    assert sum(call.kind == "generate" for call in server.calls) == 100 and max(server.paid.values()) == 1
    spent = float(re.findall(r"([\d.]+) USD spent in total", said[2])[-1])
    stated = float(re.findall(r"about ([\d.]+) USD if every answer passes at once", GUIDE)[0])
    assert spent == pytest.approx(stated, rel=0.15), "the loopback server bills about what the plan expects"
    every = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + "".join(said).encode()
    assert API_KEY.encode() not in every and b"Bearer" not in every
