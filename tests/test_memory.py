"""`echo4o info MODEL --plan`: what it counts is what is allocated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from echo4o import Echo4oPipeline
from echo4o.cli import app
from echo4o.modeling.bagel.convert import convert_to_diffusers
from echo4o.planning.dry_run import FusedAttention, PeakBytes, vae_bytes
from echo4o.planning.generation_memory import make_plan, matrices, read_stored
from echo4o.testing.hub import LoopbackHub
from echo4o.testing.processes import run_script
from echo4o.training.backbones.bagel import BagelBackbone
from echo4o.training.backbones.base import ImageCall

COMPONENTS = BagelBackbone.component_classes
CHECKPOINT = Path(__file__).parent / "parity/golden/checkpoint"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = Echo4oPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_weights_are_the_bytes_that_are_allocated(folder, pipe):
    stored = read_stored(str(folder))
    for name in COMPONENTS:
        assert stored.nbytes(name) == pipe.placement()[name].nbytes
    smaller = sum(matrices(stored.tensors["transformer"]).values())
    fresh = Echo4oPipeline.from_pretrained(folder)
    fresh.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    biases = sum(p.numel() for n, p in fresh.transformer.named_parameters() if n.endswith("bias") and "layers." in n)
    assert fresh.placement()["transformer"].dtypes["float8_e4m3fn"] == smaller + biases


def test_release_sizes():
    stored = read_stored("release")
    plan = make_plan(stored, 24e9, ImageCall(None, None))
    counts = {name: facts["parameters"] for name, facts in plan.weights.items()}
    assert counts == {"transformer": 14_155_484_736, "vision_model": 419_533_728, "vae": 83_819_683}
    assert plan.weights["transformer"]["bytes"] == 2 * (14_155_484_736 + 4096 * 3584)
    text, picture, reference = 128 + 2, 4096 + 2, 4096 + 2 + 4900 + 2
    assert plan.memory.caches == (text + reference + picture + text + picture) * 2 * 28 * 4 * 128 * 2
    fits = {row.option.name: row.fits for row in plan.rows}
    assert not fits["all on the GPU"] and not fits["model offload"] and fits["group offload, blocks"]
    assert make_plan(stored, 80e9, plan.call).recommended.option.name == "all on the GPU"
    assert make_plan(stored, 4e9, plan.call).recommended is None


def caches_of(pipe, **options) -> int:
    """Bytes of the KV caches while a picture is drawn."""
    made, new_cache = [], pipe.transformer.new_cache
    pipe.transformer.new_cache = lambda: made.append(new_cache()) or made[-1]
    try:
        pipe(num_inference_steps=1, output_type="latent", **options)
    finally:
        del pipe.transformer.new_cache
    tensors = [x for cache in made for x in [*cache._keys, *cache._values]]
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_caches_are_what_is_allocated(folder, pipe, references, batch):
    stored = read_stored(str(folder))
    side = pipe.vae_limits.max_size
    prompt = "a red cat"
    text = len(pipe.tokenizer.encode(prompt))
    image = [[Image.new("RGB", (side, side))]] * batch if references else None
    got = caches_of(pipe, prompt=[prompt] * batch, image=image, height=64, width=32)
    grid = pipe.vision_limits.size(side, side)
    seen = (grid[0] // pipe.vision_model.config.patch_size) * (grid[1] // pipe.vision_model.config.patch_size)
    largest = stored.components["vision_model"].config["max_patches_per_side"] ** 2
    t = stored.components["transformer"].config
    per_token = 2 * t["num_layers"] * t["hidden_size"] // t["num_attention_heads"] * t["num_key_value_heads"] * 4
    call = ImageCall(64, 32, batch, references, text)
    planned = BagelBackbone.call_memory(stored.components, stored.index, call, 4).caches
    assert planned - got == batch * references * (largest - seen) * per_token


@pytest.mark.long
def test_an_update_allocates_what_the_formula_says(monkeypatch):
    # The formula is of one group; larger batches are computed in several.
    monkeypatch.setattr("echo4o.modeling.bagel.pipeline_echo4o.activation_limit", lambda device: float("inf"))
    tiny = Echo4oPipeline.from_original(CHECKPOINT)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
    transformer = type(tiny.transformer)(**{**tiny.transformer.config, **sizes}).eval()
    vision = type(tiny.vision_model)(**{**tiny.vision_model.config, "output_size": 256}).eval()
    pipe = Echo4oPipeline(**{**tiny.components, "transformer": transformer, "vision_model": vision})
    pipe.set_progress_bar_config(disable=True)
    side, peaks, forward = pipe.vae_limits.max_size, [], transformer.forward

    def counted(*args, **kwargs):
        with PeakBytes() as peak:
            result = forward(*args, **kwargs)
        peaks.append(peak.peak)
        return result

    transformer.forward = counted
    image = Image.new("RGB", (side, side))
    pipe(["a red cat"] * 4, image=[image] * 4, height=side, width=side, num_inference_steps=2, output_type="latent")
    expected = BagelBackbone.call_memory(pipe.components, {}, ImageCall(side, side, 4, 1), 4).update
    assert 0.95 < peaks[-1] / expected < 1.05, (peaks, expected)


def test_the_dry_run_of_the_vae_counts_what_a_real_one_allocates(folder, pipe):
    stored = read_stored(str(folder))
    with torch.no_grad(), PeakBytes() as peak, FusedAttention():
        pipe.vae.decode(torch.zeros(1, 16, 8, 8))
    assert vae_bytes(stored.components["vae"], 64, 64, torch.float32, decode=True) == pytest.approx(
        peak.peak, rel=0.05
    )


# --- the command -----------------------------------------------------------------------------------------------------


def run(*arguments: str):
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_command_prints_a_plan(folder):
    result = run(folder, "--plan", "--gpu", "24GB", "--height", 32, "--width", 64)
    assert result.exit_code == 0, result.output
    assert "all on the GPU" in result.output and f"load_pipeline('{folder}'" in result.output
    facts = json.loads(run(folder, "--plan", "--gpu", "24GB", "--json", "--references", 0).stdout)
    assert facts["image"]["branches"] == 2 and facts["options"][0]["fits"] and facts["recommended"]
    transformer = facts["weights"]["transformer"]
    assert transformer["dtypes"] == ["float32"] and transformer["bytes"] == read_stored(str(folder)).nbytes(
        "transformer"
    )


def test_where_nothing_fits_the_exit_code_says_so():
    result = run("release", "--plan", "--gpu", "4GB")
    assert result.exit_code == 1 and "nothing fits" in result.output and "echo4o generate" not in result.output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--plan"], "pass a model"),
        (["nowhere", "--plan", "--gpu", "24GB"], "there is no folder nowhere"),
        (["release", "--plan", "--gpu", "much"], "is not an amount of memory"),
        (["release", "--plan", "--gpu", "24GB", "--height", "1000"], "multiples of 16 from 16 to 1024"),
        (["release", "--plan", "--gpu", "24GB", "--references", "5"], "takes 4 per prompt at most"),
        (["release"], "add --plan"),
        ([str(CHECKPOINT), "--plan", "--gpu", "24GB"], "has no model_index.json; convert"),
    ],
)
def test_command_refuses(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and message in words(result.output)


def test_what_is_read_of_a_damaged_folder(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    result = run(copy, "--plan", "--gpu", "24GB")
    assert result.exit_code == 2 and "is truncated" in result.output


HUB = """
import sys, json
from echo4o.cli import main
sys.argv = ["echo4o", "info", "ns/model", "--plan", "--gpu", "24GB", "--json"]
main()
"""


@pytest.mark.long
def test_a_repository_is_planned_by_its_headers(folder, tmp_path):
    (tmp_path / "home").mkdir()
    with LoopbackHub() as hub:
        hub.add_folder("ns/model", folder)
        done = run_script(HUB, env=hub.environment(tmp_path / "home"))
    facts = json.loads(done.stdout)
    stored = read_stored(str(folder))
    assert {n: f["bytes"] for n, f in facts["weights"].items()} == {n: stored.nbytes(n) for n in COMPONENTS}
    assert not list((tmp_path / "home").rglob("*.safetensors")), "weights were fetched"
