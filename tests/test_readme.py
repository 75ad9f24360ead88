"""Runs the README's examples, in its order, in one folder that holds a tiny original checkpoint and a tiny release of the dataset."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.dataset_scripts.layout import small_release
from tests.openai_server import KEY, OpenAIServer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
# A fenced block right after the mark is run.
EXAMPLE = re.compile(r"^<!-- test -->\n```(bash|python)\n(.*?)^```$", re.M | re.S)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
CHECKPOINT = ROOT / "tests" / "parity" / "golden" / "checkpoint"


def test_readme_opens_with_the_two_commands():
    first = BLOCK.search(README)
    assert [line.split("#")[0].strip() for line in first[2].splitlines()] == ["make quickstart", "make test"]


def test_examples_are_short():
    examples = EXAMPLE.findall(README)
    assert README.count("<!-- test -->") == len(examples) > 0, "a mark stands right above a bash or python block"
    for _, code in examples:
        assert len([line for line in code.splitlines() if line.strip()]) <= 10, code


def test_every_python_example_is_run():
    marked = [code for language, code in EXAMPLE.findall(README) if language == "python"]
    assert [code for language, code in BLOCK.findall(README) if language == "python"] == marked


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target


# Five processes that import torch and diffusers: on a machine busy with other work that takes minutes.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_examples_run(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "BAGEL-7B-MoT")
    small_release(tmp_path / "Echo-4o-Image")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # The model is tiny: more threads would only wait for each other.
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    with OpenAIServer() as judge:
        environment |= {"OPENAI_BASE_URL": judge.url, "OPENAI_API_KEY": KEY}
        for script in _scripts():
            done = subprocess.run(
                script, cwd=tmp_path, env=environment, capture_output=True, text=True, errors="replace"
            )
            assert done.returncode == 0, f"{script[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for name in ("lighthouse.png", "night.png", "mine.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


def _scripts() -> list[list[str]]:
    """The commands to run. Neighbouring Python examples share a process (imports are slow) but no variables."""
    scripts, neighbours = [], []

    def flush():
        if neighbours:
            code = "\n".join(f"exec({block!r}, {{'__name__': '__main__'}})" for block in neighbours)
            scripts.append([sys.executable, "-c", code])
            neighbours.clear()

    for language, code in EXAMPLE.findall(README):
        if language == "python":
            neighbours.append(code)
        else:
            flush()
            scripts.append(["bash", "-euo", "pipefail", "-c", code])
    flush()
    return scripts
