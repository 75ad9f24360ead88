"""Every script of examples/ runs on a tiny model, with a Hub and a judge on the loopback interface."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import echo4o
from echo4o.testing.hub import LoopbackHub
from echo4o.testing.openai_server import API_KEY, OpenAIServer
from tests.test_package import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ARTEFACTS = ROOT / "tests" / "artefacts_0_1"
# Documented modules beside echo4o itself.
PUBLIC = {"echo4o", "echo4o.evaluation"}


class World:
    """A Hub that holds a tiny pipeline and a small dataset, a judge, and a working folder."""

    def __init__(self, folder: Path, hub: LoopbackHub, judge: OpenAIServer):
        self.folder, self.hub, self.judge = folder, hub, judge
        self.ran: set[str] = set()

    def run(self, script: str, *arguments) -> str:
        self.ran.add(script)
        variables = self.hub.environment(self.folder / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        variables |= {"OPENAI_BASE_URL": self.judge.url, "OPENAI_API_KEY": API_KEY}
        variables |= {"ECHO4O_CACHE": str(self.folder / "cache")}
        command = [sys.executable, ROOT / "examples" / script, *arguments]
        done = subprocess.run(
            list(map(str, command)), cwd=self.folder, env=os.environ | variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def size(self, name: str) -> tuple[int, int]:
        with Image.open(self.folder / name) as image:
            return image.size


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    (folder / "home").mkdir()
    with LoopbackHub(user="owner") as hub, OpenAIServer() as judge:
        hub.add_folder("owner/echo-4o", ARTEFACTS / "pipeline")
        hub.add_folder("owner/echo-4o-image", ARTEFACTS / "dataset", kind="datasets")
        yield World(folder, hub, judge)


pytestmark = [pytest.mark.timeout(900)]


@pytest.mark.long
def test_generate_and_edit(world):
    world.run("generate.py", "a red square", "--model", "owner/echo-4o", "--steps", 2, "--out", "first.png")
    world.run("generate.py", "a blue square", "--model", "owner/echo-4o", "--steps", 2, "--out", "second.png")
    assert world.size("first.png") == world.size("second.png") == (64, 64)
    world.run("edit.py", "both", "first.png", "second.png", "--model", "owner/echo-4o", "--steps", 2, "--out", "3.png")
    assert world.size("3.png") == (64, 64)


@pytest.mark.long
def test_batch_continues_with_what_is_missing(world):
    (world.folder / "prompts.txt").write_text("a red square\n\na blue square\na green square\n")
    given = ["prompts.txt", "--model", "owner/echo-4o", "--steps", 2, "--out", "images", "--batch-size", 2]
    assert world.run("batch.py", *given).startswith("3 images")
    images = world.folder / "images"
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    (images / "00001.png").unlink()
    assert world.run("batch.py", *given).startswith("1 images")
    assert sorted(before) == sorted(path.name for path in images.iterdir()) == ["00000.png", "00001.png", "00002.png"]


@pytest.mark.long
def test_evaluate_a_folder(world):
    evaluation = ARTEFACTS / "evaluation"
    world.judge.verdict = lambda call: {"reason": "as asked", "correct": 1}
    given = [evaluation / "pictures", "--prompts", evaluation / "prompts.jsonl", "--judge", "openai:judge"]
    assert "score 1.000, coverage 100.0%" in world.run("evaluate_folder.py", *given, "--out", "scores")
    asked = len(world.judge.calls)
    world.run("evaluate_folder.py", *given, "--out", "scores")
    assert len(world.judge.calls) == asked


@pytest.mark.long
def test_train_and_publish(world):
    given = ["--model", "owner/echo-4o", "--dataset", "owner/echo-4o-image", "--steps", 2, "--rank", 4]
    world.run("train_lora.py", *given, "--out", "runs/lora")
    assert world.size("runs/lora/lighthouse.png") == (64, 64)
    log = (world.folder / "runs" / "lora" / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [0, 1]
    given = ["runs/lora", "owner/my-lora", "--base-model", "owner/echo-4o"]
    world.run("publish.py", *given, "--dry-run")
    assert ("models", "owner/my-lora") not in world.hub.repos
    world.run("publish.py", *given)
    assert "README.md" in world.hub.repo("owner/my-lora").files
    assert world.size("published.png") == (64, 64)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_listed_and_uses_public_names(path):
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert f"python examples/{path.name} " in (ast.get_docstring(tree) or "")
    assert f"({path.name})" in (path.parent / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 45
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "echo4o":
            assert node.module in PUBLIC, node.module
            assert node.module != "echo4o" or {alias.name for alias in node.names} <= set(echo4o.__all__)


def test_every_example_is_run():
    run_here = Path(__file__).read_text("utf-8")
    for path in EXAMPLES:
        assert f'world.run("{path.name}"' in run_here, path.name
