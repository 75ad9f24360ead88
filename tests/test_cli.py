"""The command line: help, lazy imports, how mistakes are told, and what is handed to the pipeline."""

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import httpx2
import jinja2
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import echo4o
from echo4o.cli import app, frame, generate


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def words(text: str) -> str:
    """Text without the line breaks and frames that a terminal's width puts in."""
    return " ".join(text.replace("│", " ").split())


def test_help_never_imports_torch():
    code = "import sys\nimport echo4o.cli\ntry: echo4o.cli.app(['generate', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'diffusers', 'datasets', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_python_m_and_version():
    done = subprocess.run([sys.executable, "-m", "echo4o", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"echo4o {echo4o.__version__}"


def test_info_as_json():
    result = run("info", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["echo4o"]["version"] == echo4o.__version__
    assert facts["libraries"]["torch"]
    assert "cpu" in facts["devices"]
    assert "next: echo4o quickstart" in result.stderr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text('{"_class_name": ["pipeline", "Echo4oPipeline"]}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "a-2.png").mkdir()
    Image.new("RGB", (32, 48), "red").save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:50])
    (tmp_path / "huge.png").write_bytes(_with_size(data, 20_000, 20_000))
    return tmp_path


def _with_size(png: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says that it is another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


MISTAKES = {
    "empty prompt": (["generate", " ", "-m", "model"], "the prompt is empty"),
    "no such folder": (["generate", "x", "-m", "nowhere"], "--model nowhere: there is no such folder"),
    "no checkpoint": (["chat", "x", "-m", "empty"], "--model empty: the folder contains neither"),
    "model is a file": (["chat", "x", "-m", "red.png"], "--model red.png is a file"),
    "no image": (["generate", "x", "-m", "model", "-i", "none.png"], "--image none.png: No such file"),
    "broken image": (["generate", "x", "-m", "model", "-i", "text.png"], "--image text.png: it cannot be decoded"),
    "out is no picture": (["generate", "x", "-m", "model", "-o", "x.txt"], "--out x.txt: not an image file"),
    "huge image": (["generate", "x", "-m", "model", "-i", "huge.png"], "--image huge.png: Image size (400000000"),
    "damaged image": (["generate", "x", "-m", "model", "-i", "cut.png"], "--image cut.png: it cannot be decoded"),
    "out below a file": (["generate", "x", "-m", "model", "-o", "red.png/a.png"], "--out red.png/a.png: cannot be"),
    "out is nowhere": (["generate", "x", "-m", "model", "-o", "/proc/x/a.png"], "--out /proc/x/a.png: cannot be"),
    "numbered out is a folder": (
        ["generate", "x", "-m", "model", "-o", "a.png", "--num-images", "2"],
        "--out a-1.png: cannot be written (a-2.png: Is a directory)",
    ),
    "seed too large": (["generate", "x", "-m", "model", "--seed", str(2**63)], "seed"),
    "unknown device": (["generate", "x", "-m", "model", "--device", "tpu9"], "--device tpu9"),
    "unknown option value": (["generate", "x", "-m", "model", "--dtype", "int8"], "int8"),
    "zero steps": (["generate", "x", "-m", "model", "--steps", "0"], "steps"),
    "nothing to convert": (["convert", "nowhere", "out"], "nowhere"),
    "no checkpoint to convert": (["convert", "empty", "out"], "empty"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, folder):
    arguments, message = MISTAKES[name]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in words(result.stderr)
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize("error", [SyntaxError("broken PNG file"), ValueError("bad chunk"), OSError("truncated")])
def test_whatever_a_decoder_raises_is_a_mistake_in_one_line(folder, monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    result = run("chat", "x", "-m", "model", "-i", "red.png")
    assert result.exit_code == 2 and "--image red.png: it cannot be decoded as an image" in words(result.stderr)


def test_the_largest_seed(folder, fake):
    result = run(
        "generate", "x", "-m", "model", "--device", "cpu", "--seed", 2**63 - 1, "--num-images", 2, "-o", "b.png"
    )
    assert result.exit_code == 0, result.output


def test_cuda_absent(folder, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = run("generate", "x", "-m", "model", "--device", "cuda")
    assert result.exit_code == 2
    assert "error: --device cuda: not available" in result.stderr


def test_debug_shows_the_traceback_wherever_it_stands(folder):
    for arguments in (["--debug", "chat", "x", "-m", "nowhere"], ["chat", "x", "-m", "nowhere", "--debug"]):
        done = subprocess.run([sys.executable, "-m", "echo4o", *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "error: --model nowhere" in done.stderr


def test_interrupt(folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "load_pipeline", interrupt)
    result = run("chat", "x", "-m", "model")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_bugs_keep_their_traceback(folder, monkeypatch):
    def bug(*_):
        raise TypeError("a bug")

    monkeypatch.setattr(generate, "load_pipeline", bug)
    assert isinstance(run("chat", "x", "-m", "model").exception, TypeError)


def test_explain():
    class OutOfMemoryError(RuntimeError):
        pass

    assert frame.explain(ValueError("bad")) == "bad"
    assert frame.explain(FileNotFoundError(2, "No such file or directory", "a.txt")) == (
        "a.txt: No such file or directory"
    )
    assert frame.explain(OutOfMemoryError("3 GiB")).startswith("out of memory: 3 GiB")
    assert "pip install gradio" in frame.explain(ModuleNotFoundError("no", name="gradio"))
    assert frame.explain(ModuleNotFoundError("no", name="echo4o.nothing")) is None
    assert frame.explain(RuntimeError("a bug")) is None
    assert frame.explain(MemoryError()) == "out of memory"
    assert frame.explain(UnicodeDecodeError("utf-8", b"\x80", 0, 1, "bad")).startswith("a text file is not UTF-8")
    for error in (yaml.YAMLError("bad"), httpx2.ConnectError("cut"), jinja2.TemplateError("bad")):
        assert frame.explain(error) == str(error), "what libraries say about files and networks is no bug of ours"
    assert frame.explain(BrokenPipeError(32, "Broken pipe")) is None


class FakePipeline:
    """Records what it is asked for."""

    def __init__(self):
        self.calls = []

    def from_pretrained(self, model, **options):
        self.calls.append(("from_pretrained", model, options))
        return self

    def from_original(self, model, **options):
        self.calls.append(("from_original", model, options))
        return self

    def to(self, device):
        self.calls.append(("to", str(device)))
        return self

    def placement(self):
        return SimpleNamespace(line="all of it is on paper")

    def __call__(self, **options):
        self.calls.append(("call", options))
        count = options["num_images_per_prompt"]
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * count, texts=["a plan"] * count)

    def chat(self, prompt, **options):
        self.calls.append(("chat", prompt, options))
        return "a red field"


def test_quickstart_hands_everything_over(folder, monkeypatch):
    calls = []
    module = SimpleNamespace(run=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "echo4o.quickstart.run", module)
    result = run("quickstart", "--short", "--out", "here", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert calls == [{"out": Path("here"), "short": True, "seed": 3}]


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_convert_writes_the_layout_asked_for(layout, folder, monkeypatch):
    from echo4o.modeling.bagel import convert

    calls = []
    monkeypatch.setattr(convert, f"convert_to_{layout}", lambda src, dst: calls.append((src, dst)))
    result = run("convert", "model", "new folder", "--to", layout)
    assert result.exit_code == 0, result.output
    assert calls == [(Path("model"), Path("new folder"))]
    assert result.stdout.strip() == "new folder"
    assert "'new folder'" in result.stderr, "the next command can be pasted"


@pytest.fixture
def fake(monkeypatch):
    pipeline = FakePipeline()
    monkeypatch.setattr(echo4o, "Echo4oPipeline", pipeline, raising=False)
    return pipeline


def test_generate_hands_everything_over(folder, fake):
    result = run(
        *("generate", "a fox", "-m", "model", "-i", "red.png", "-i", "red.png", "-o", "new/fox.png"),
        *("--steps", 3, "--guidance-scale", 2.5, "--image-guidance-scale", 1.5, "--height", 64, "--width", 32),
        *("--seed", 7, "--think", "--num-images", 2, "--device", "cpu", "--dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output
    import torch

    assert fake.calls[:2] == [("from_pretrained", "model", {"dtype": torch.bfloat16}), ("to", "cpu")]
    options = fake.calls[2][1]
    assert [g.initial_seed() for g in options.pop("generator")] == [7, 8]
    assert [i.size for i in options.pop("image")] == [(32, 48), (32, 48)]
    assert options == {
        "prompt": "a fox",
        "think": True,
        "num_images_per_prompt": 2,
        "num_inference_steps": 3,
        "guidance_scale": 2.5,
        "image_guidance_scale": 1.5,
        "height": 64,
        "width": 32,
    }
    assert result.stdout.splitlines() == ["a plan", "new/fox-1.png", "new/fox-2.png"]
    assert (folder / "new" / "fox-2.png").is_file()
    assert "all of it is on paper" in result.stderr
    assert "seed 7" in result.stderr and "next: echo4o generate" in result.stderr


def test_generate_leaves_defaults_to_the_pipeline(folder, fake):
    result = run("generate", "a fox", "-m", "model", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert fake.calls[0] == ("from_pretrained", "model", {})
    options = fake.calls[2][1]
    assert set(options) == {"prompt", "num_images_per_prompt", "generator"}
    assert result.stdout.strip() == "echo4o.png"


def test_chat_reads_an_original_checkpoint(folder, fake):
    (folder / "empty" / "llm_config.json").write_text("{}")
    result = run("chat", "what?", "-m", "empty", "-i", "red.png", "--max-new-tokens", 5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert fake.calls[0] == ("from_original", "empty", {})
    _, prompt, options = fake.calls[2]
    assert (prompt, options["max_new_tokens"], len(options["image"])) == ("what?", 5, 1)
    assert result.stdout.strip() == "a red field"


def test_options_of_0_1_still_work_with_a_warning(folder, fake):
    given = ["generate", "a fox", "-m", "model", "--device", "cpu"]
    result = run(*given, "--guidance", 2.5, "--image-guidance=1.5")
    assert result.exit_code == 0, result.output
    assert fake.calls[2][1]["guidance_scale"] == 2.5 and fake.calls[2][1]["image_guidance_scale"] == 1.5
    assert "warning: --guidance is now called --guidance-scale" in result.stderr
    assert "warning: --image-guidance is now called --image-guidance-scale" in result.stderr
    assert result.stdout.strip() == "echo4o.png", "stdout contains results only"
    assert "warning" not in run(*given, "--guidance-scale", 2.5).stderr


def test_renamed_options_exist():
    from tests.commands import tree

    commands = [command for _, command in tree() if isinstance(command, frame.Command)]
    options = {name for command in commands for parameter in command.params for name in parameter.opts}
    assert set(frame.RENAMED_OPTIONS.values()) <= options
    assert not set(frame.RENAMED_OPTIONS) & options


def test_a_conversion_into_a_folder_in_use_is_refused(tmp_path):
    from echo4o.common.locks import FolderLock

    checkpoint = Path(__file__).parent / "parity" / "golden" / "checkpoint"
    with FolderLock(tmp_path / "out"):
        done = CliRunner().invoke(app, ["convert", str(checkpoint), str(tmp_path / "out")])
    assert done.exit_code == 2 and "out is in use by another process" in done.stderr
    assert not (tmp_path / "out").exists()
