"""`echo4o generate`: images that remember how they were made, prompt files, and ways to load a model."""

import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.common.image_metadata import image_sha256, read_metadata, to_png
from echo4o.common.locks import FolderLock
from echo4o.endpoints.chat_endpoint import ImageFile

PIPELINE = Path(__file__).parent / "artefacts_0_1" / "pipeline"
SMALL = ["--steps", 2, "--height", 32, "--width", 32]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(PIPELINE, "model")
    return tmp_path


def generate(*arguments, code: int = 0) -> str:
    """stdout and stderr of the command, in one line."""
    result = CliRunner().invoke(app, ["generate", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_an_image_remembers_and_is_generated_again_bit_for_bit(folder):
    generate("a red circle", "-m", "model", *SMALL, "--seed", 5, "--num-images", 2, "--sheet", "-o", "a.png")
    metadata = read_metadata(Path("a-2.png"))
    assert (metadata.prompt, metadata.seed, metadata.index) == ("a red circle", 6, 1)
    assert metadata.settings == {"num_inference_steps": 2, "height": 32, "width": 32}
    assert metadata.model == "model" and str(folder) not in Path("a-2.png").read_bytes().decode("latin-1")
    assert Image.open("a-1-sheet.png").width == 2 * 256
    generate("--like", "a-2.png", "-m", folder / "model", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("a-2.png").read_bytes()


def test_like_asks_for_the_references_that_it_misses():
    generate("a red circle", "-m", "model", *SMALL, "--seed", 5, "-o", "a.png")
    generate("make it blue", "-i", "a.png", "-m", "model", *SMALL, "--seed", 1, "-o", "b.png")
    assert "generated from 1 reference images, and 0 are given" in generate("--like", "b.png", "-m", "model", code=2)
    Image.new("RGB", (32, 32), "red").save("other.png")
    message = generate("--like", "b.png", "-i", "other.png", "-m", "model", code=2)
    assert "--image number 1 is not the image that b.png was generated from" in message
    Image.open("a.png").save("copy.png", compress_level=1)  # other bytes, the same pixels
    generate("--like", "b.png", "-i", "copy.png", "-m", "model", "-o", "again.png")
    assert Image.open("again.png").tobytes() == Image.open("b.png").tobytes()


def test_options_replace_what_the_image_says():
    generate("a red circle", "-m", "model", *SMALL, "--seed", 5, "-o", "a.png")
    generate("--like", "a.png", "-m", "model", "--seed", 6, "--steps", 3, "-o", "b.png")
    metadata = read_metadata(Path("b.png"))
    assert metadata.seed == 6 and metadata.settings == {"num_inference_steps": 3, "height": 32, "width": 32}


def test_an_image_without_metadata_is_refused(folder):
    generate("a red circle", "-m", "model", *SMALL, "--seed", 5, "--no-metadata", "-o", "a.png")
    assert "a.png: it has no metadata of echo4o" in generate("--like", "a.png", "-m", "model", code=2)
    assert "no-such.png: No such file" in generate("--like", "no-such.png", "-m", "model", code=2)
    generate("a red circle", "-m", "model", *SMALL, "--seed", 5, "-o", "b.png")
    assert "folder 'model'; pass where it is with --model" in generate("--like", "b.png", code=2)


@pytest.mark.parametrize("text", ["[]", "{", '{"prompt": 1}', '{"prompt": "x", "seeds": [], "index": 0}'])
def test_hostile_metadata_is_one_error(text):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("echo4o", text)
    Image.new("RGB", (8, 8)).save("x.png", pnginfo=info)
    assert "error: x.png: " in generate("--like", "x.png", "-m", "model", code=2)


def test_metadata_changes_no_key_of_a_judgement(folder):
    generate("a red circle", "-m", "model", *SMALL, "--seed", 5, "-o", "a.png")
    image = Image.open("a.png")
    Path("plain.png").write_bytes(to_png(image, None))
    assert Path("a.png").read_bytes() != Path("plain.png").read_bytes()
    assert ImageFile.read(Path("a.png")).sha256 == ImageFile.read(Path("plain.png")).sha256
    assert image_sha256(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 99)) == image_sha256(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 99)
    ), "a torn file"
    other = b"tEXtComment\0x"
    chunk = struct.pack(">I", len(other) - 4) + other + struct.pack(">I", zlib.crc32(other))
    data = Path("plain.png").read_bytes()
    assert image_sha256(data[:33] + chunk + data[33:]) != image_sha256(data), "chunks of others count"


def test_a_prompt_file_resumes(folder):
    Image.new("RGB", (40, 40), "red").save("red.png")
    lines = ["a red circle", "", '{"prompt": "a cube", "seed": 9, "num_images": 2, "image": "red.png", "steps": 1}']
    Path("prompts.txt").write_text("\n".join(lines) + "\n")
    output = generate("--prompts", "prompts.txt", "-m", "model", *SMALL, "-o", "out")
    assert "[2/2] a cube" in output and "3 images and a contact sheet" in output
    names = ["0001.png", "0002-1.png", "0002-2.png"]
    assert sorted(path.name for path in Path("out").glob("0*")) == names
    records = [json.loads(line) for line in Path("out/images.jsonl").read_text().splitlines()]
    assert [record["file"] for record in records] == names
    assert [record["seed"] for record in records] == [0, 9, 10]
    assert read_metadata(Path("out/0002-2.png")).settings["num_inference_steps"] == 1

    before = {name: Path("out", name).read_bytes() for name in names}
    Path("out/0001.png").unlink()
    output = generate("--prompts", "prompts.txt", "-m", "model", *SMALL, "-o", "out")
    assert "[1/2]" in output and "[2/2]" not in output, "only what is missing"
    assert {name: Path("out", name).read_bytes() for name in names} == before
    with FolderLock("out"):
        refused = generate("--prompts", "prompts.txt", "-m", "model", *SMALL, "-o", "out", code=2)
    assert f"out is in use by another process (process {os.getpid()})" in refused
    output = generate("--prompts", "prompts.txt", "-m", "model", "--steps", 3, "-o", "out", code=2)
    assert "out/0001.png was generated with another settings" in output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "step": 3}', "line 2: unknown key 'step'"),
        ('{"prompt": "x", "steps": "3"}', "line 2: steps is '3'"),
        ('{"prompt": "x", "steps": 0}', "line 2: steps is 0"),
        ('{"prompt": " "}', "line 2: the prompt is missing or empty"),
        ('{"prompt": "x"', "line 2: not JSON"),
        ('{"prompt": "x", "image": ["none.png"]}', "prompt 2: none.png: No such file"),
        ('{"prompt": "x", "think": 1}', "line 2: think is 1"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_generated(line, message):
    Path("prompts.jsonl").write_text(f"a red circle\n{line}\n")
    assert message in generate("--prompts", "prompts.jsonl", "-m", "model", "-o", "out", code=2)
    assert not Path("out").exists()


def test_one_source_of_prompts():
    message = "give one of a prompt, --prompts FILE or --like IMAGE.png"
    assert message in generate("-m", "model", code=2)
    assert message in generate("a red circle", "--like", "a.png", "-m", "model", code=2)


@pytest.mark.long
def test_adapters_with_scales(folder):
    adapter = PIPELINE.parent / "adapters" / "diffusers"
    images = {}
    for name, scale in {"none": None, "zero": 0, "half": 0.5, "one": 1}.items():
        lora = [] if scale is None else ["--lora", adapter if scale == 1 else f"{adapter}:{scale}"]
        generate("a red circle", "-m", "model", *SMALL, "--seed", 5, *lora, "-o", f"{name}.png")
        images[name] = Image.open(f"{name}.png").tobytes()
    assert images["zero"] == images["none"] and len(set(images.values())) == 3
    metadata = read_metadata(Path("half.png"))
    assert metadata.adapters[0]["name"] == "diffusers" and metadata.adapters[0]["scale"] == 0.5
    assert "pass where it is with --lora" in generate("--like", "half.png", "-m", "model", code=2)
    generate("--like", "half.png", "-m", "model", "--lora", f"{adapter}:0.5", "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("half.png").read_bytes()
    assert "'x' is not a number" in generate("a", "-m", "model", "--lora", f"{adapter}:x", code=2)


@pytest.mark.long
@pytest.mark.parametrize("option", ["--offload group", "--offload disk", "--cache taylorseer", "--cache first-block"])
def test_ways_to_run(option):
    generate("a red circle", "-m", "model", "--steps", 6, "--height", 32, "--width", 32, "--seed", 5, "-o", "a.png")
    same = ["-m", "model", "--steps", 6, "--height", 32, "--width", 32, "--seed", 5, *option.split()]
    generate("a red circle", *same, "-o", "b.png")
    key, value = option.removeprefix("--").split()
    assert read_metadata(Path("b.png")).loading[key] == value
    if key == "offload":
        assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


@pytest.mark.long
def test_step_caches_of_other_models(monkeypatch):
    """OmniGen2 has the cache of the first block; BLIP3-o's head has none. What they lack is an error of one line."""
    from echo4o.modeling.omnigen2.transformer_omnigen2 import OmniGen2Transformer2DModel

    enable, thresholds = OmniGen2Transformer2DModel.enable_cache, []

    def recorded(model, config):
        enable(model, config)
        thresholds.append(config.threshold)

    monkeypatch.setattr(OmniGen2Transformer2DModel, "enable_cache", recorded)
    golden = Path(__file__).parent / "parity" / "golden_omnigen2" / "checkpoint"
    call = ["a dot", "-m", golden, *SMALL, "--seed", 5]
    generate(*call, "--cache", "first-block", "-o", "b.png")
    assert read_metadata(Path("b.png")).loading["cache"] == "first-block" and thresholds == [0.05]
    message = generate(*call, "--cache", "taylorseer", "-o", "c.png", code=2)
    assert "--cache taylorseer: TaylorSeerCacheConfig is not supported: use FirstBlockCacheConfig" in message
    blip3o = Path(__file__).parent / "parity" / "golden_blip3o" / "checkpoint"
    message = generate("a dot", "-m", blip3o, "--cache", "first-block", "-o", "d.png", code=2)
    assert "--cache first-block: Blip3oPipeline has no step cache" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--offload", "model", "--device", "cpu"], "--offload model moves weights"),
        (["--quantize", "nf4", "--device", "cpu"], "--quantize nf4 needs a CUDA GPU"),
        (["--quantize", "int8", "--dtype", "float16"], "--quantize computes in bfloat16 or float32"),
    ],
)
def test_options_without_effect_are_errors(options, message):
    assert message in generate("a red circle", "-m", "model", *options, code=2)


@pytest.mark.long
def test_quantized_pipelines_are_saved_and_load_in_both_modes(folder):
    pytest.importorskip("torchao")
    import torch
    from diffusers import DiffusionPipeline

    from echo4o import Echo4oPipeline

    result = CliRunner().invoke(app, ["quantize", "model", "model-int8"])
    assert result.exit_code == 0, result.output
    facts = json.loads(Path("model-int8/quantization.json").read_text())
    assert facts["method"] == "int8" and facts["quantized"] == ["transformer"]
    images = []
    for load in (Echo4oPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        trusted = {} if load.__self__ is Echo4oPipeline else {"trust_remote_code": True}
        pipe = load("model-int8", **trusted)
        assert "int8" in pipe.placement()["transformer"].dtypes
        call = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        images.append(pipe("a red circle", **call).images[0].tobytes())
    assert images[0] == images[1]
    assert CliRunner().invoke(app, ["quantize", "model", "model-int8"]).exit_code == 2
