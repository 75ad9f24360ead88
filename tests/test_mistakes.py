"""Typical mistakes of a person at each command: one line that names what is wrong, exit code 2, and nothing written."""

import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from echo4o.cli import app
from tests.dataset_scripts.layout import small_release
from tests.test_help import LEAVES

# (command line, part of the message). The folder they run in is made by `folder` below.
MISTAKES = {
    "quickstart": [("--out text.txt", "text.txt"), ("--out text.txt/below", "text.txt")],
    "info": [
        ("nowhere --plan --gpu 24GB", "nowhere"),
        ("empty --plan --gpu 24GB", "empty"),
        ("text.txt --plan --gpu 24GB", "text.txt"),
        ("release --plan --gpu much", "much"),
    ],
    "serve": [("--model nowhere", "--model nowhere" if find_spec("uvicorn") else "echo4o[app]")],
    "quantize": [("nowhere new --method int8", "nowhere"), ("text.txt new --method int8", "text.txt")],
    "convert": [
        ("nowhere new", "nowhere"),
        ("text.txt new", "text.txt"),
        ("empty new", "empty is not an original BAGEL checkpoint"),
        ("damaged new", "damaged"),
        ("model new --to original", "model is not a BAGEL pipeline folder"),
    ],
    "generate": [
        ("'' -m model", "the prompt is empty"),
        ("x -m nowhere", "--model nowhere: there is no such folder"),
        ("x -m text.txt", "--model text.txt is a file"),
        ("x -m empty", "--model empty: the folder contains neither"),
        ("x -m model -i nowhere.png", "--image nowhere.png: No such file"),
        ("x -m model -i text.txt", "--image text.txt: it cannot be decoded"),
        ("x -m model -i empty", "--image empty: Is a directory"),
        ("x -m model -o text.txt/a.png", "--out text.txt/a.png: cannot be written"),
    ],
    "chat": [("x -m nowhere", "--model nowhere"), ("x -m model -i binary", "--image binary: it cannot be decoded")],
    "dataset inspect": [("nowhere", "nowhere: there is no such folder"), ("empty", "empty"), ("text.txt", "text.txt")],
    "dataset build": [
        ("nowhere --out new", "nowhere"),
        ("empty --out new", "empty"),
        ("release --out text.txt", "text.txt"),
        ("release --out new --map nowhere.yaml", "nowhere.yaml"),
        ("release --out new --map binary", "not UTF-8"),
        ("release --out new --map wings=output_image", "wings"),
        ("release --out new --assign nobody=multi_reference", "nobody"),
    ],
    "dataset validate": [
        ("nowhere", "nowhere"),
        ("empty", "empty"),
        ("empty --manifest", "empty/manifest.json"),
        ("release --findings text.txt/f.jsonl", "text.txt"),
    ],
    "dataset stats": [
        ("nowhere", "nowhere: there is no such folder"),
        ("release --prompts nowhere.jsonl", "nowhere.jsonl"),
        ("release --benchmark geneval", "geneval"),
    ],
    "dataset publish": [
        ("nowhere owner/name", "nowhere/manifest.json"),
        ("empty owner/name", "empty/manifest.json is not there"),
        ("text.txt owner/name", "text.txt"),
    ],
    "dataset synthesize": [
        ("nowhere.yaml --plan", "nowhere.yaml"),
        ("empty --plan", "empty"),
        ("binary --plan", "binary"),
        ("text.txt --plan", "text.txt is not a mapping"),
        ("first_hundred --out new --budget 0", "--budget 0: must be a positive"),
    ],
    "dataset precompute": [("empty --model model --out new", "empty"), ("/proc/x --model model --out new", "/proc/x")],
    "train": [
        ("nowhere", "nowhere cannot be read"),
        ("empty", "empty cannot be read"),
        ("text.txt", "text.txt is not a mapping"),
        ("binary", "not UTF-8"),
        ("lora_single_gpu --set optimizer", "--set optimizer: write section.key=value"),
        ("lora_single_gpu --set optimizer.speed=1", "speed"),
        ("lora_single_gpu --plan --set model=release --gpu much", "much"),
    ],
    "export": [("nowhere --out new", "nowhere"), ("empty --out new", "empty has no checkpoint; there are: none")],
    "push": [
        ("nowhere owner/name", "nowhere: there is no such folder"),
        ("text.txt owner/name", "text.txt"),
        ("empty owner/name", "empty cannot be published"),
    ],
    "evaluate run": [
        ("genevalpp --out new", "pass --model to generate images, or --images"),
        ("genevalplus --out new --images empty", "there is no benchmark 'genevalplus'"),
        ("genevalpp --out new --model nowhere", "--model nowhere"),
        ("genevalpp --out new --images empty --prompts nowhere.jsonl", "nowhere.jsonl"),
        ("genevalpp --out new --images empty --prompts binary", "not UTF-8"),
        ("genevalpp --out new --images empty --prompts text.txt", "text.txt, line 1: this is not JSON"),
    ],
    "evaluate generate": [
        ("genevalpp --out new --model nowhere", "--model nowhere"),
        ("genevalpp --out new --model model --prompts nowhere.jsonl", "nowhere.jsonl"),
    ],
    "evaluate judge": [("--out nowhere", "nowhere contains no evaluation yet"), ("--out text.txt", "text.txt")],
    "evaluate score": [("--out nowhere", "nowhere contains no evaluation yet"), ("--out empty", "empty")],
    "evaluate compare": [("nowhere empty", "nowhere: nothing was judged"), ("text.txt empty", "text.txt")],
    "evaluate agree": [("nowhere empty", "nowhere: nothing was judged"), ("text.txt empty", "text.txt")],
    "evaluate convert-detector": [("nowhere new", "nowhere: there is no such file")],
    "evaluate make-prompts": [
        ("omnicontext", "for genevalpp and geneval only"),
        ("genevalpp --out empty", "empty"),
        ("genevalpp --exclude empty", "empty"),
    ],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    small_release(root / "release")
    for name in ("empty", "model", "damaged"):
        (root / name).mkdir()
    (root / "model" / "model_index.json").write_text('{"_class_name": ["pipeline", "Echo4oPipeline"]}')
    (root / "damaged" / "ema.safetensors").write_bytes(bytes(100))
    (root / "text.txt").write_text("only words")
    (root / "binary").write_bytes(bytes(range(256)) * 4)
    Image.new("RGB", (32, 32)).save(root / "red.png")
    return root


def test_every_command_has_its_mistakes():
    assert {" ".join(path) for path in LEAVES} == set(MISTAKES)


@pytest.mark.parametrize(
    ("command", "line", "message"), [(c, line, m) for c, rows in MISTAKES.items() for line, m in rows]
)
def test_a_mistake_is_one_line(command, line, message, source, monkeypatch):
    monkeypatch.chdir(source)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    before = sorted(source.iterdir())
    result = CliRunner().invoke(app, [*command.split(), *shlex.split(line)])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 2, result.output
    error = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    assert len(error) == 1 and message in result.stderr, result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(source.iterdir()) == before, "it left something behind"


def test_debug_shows_the_traceback(source, monkeypatch):
    monkeypatch.chdir(source)
    for command, rows in MISTAKES.items():
        result = CliRunner().invoke(app, ["--debug", *command.split(), *shlex.split(rows[0][0])])
        assert result.exit_code == 2 and "Traceback (most recent call last)" in result.stderr, command
