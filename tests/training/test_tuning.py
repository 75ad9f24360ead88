"""What trains, what stays, and what comes out: LoRA, parts, exports."""

import json
import math

import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import load_file

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.training.backbones.bagel import BagelBackbone
from echo4o.training.checkpoints import CheckpointFolder
from echo4o.training.export import ExportError, check_keys, export_checkpoint, merge_run
from echo4o.training.model import TrainedModel, part_of, set_up
from echo4o.training.recipe import RecipeError
from echo4o.training.recipe_files import load_recipe

from .conftest import make_backbone
from .running import assert_same, run, train_here, weights_of

CLASSES = BagelBackbone.component_classes
PROMPT = "a red square"
LORA = {"method": "lora", "rank": 4, "alpha": 16}
VARIANTS = {"lora": {}, "rslora, both experts": {"rslora": True, "experts": ["gen", "und"]}, "dora": {"dora": True}}
DRAW = """
import sys, torch
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
model, adapter, out = sys.argv[1:]
pipe = Echo4oPipeline.from_pretrained(model)
pipe.load_lora_weights(adapter)
pipe("a red square", num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0].save(out)
"""


def draw(pipe) -> Image.Image:
    return pipe(PROMPT, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[0]


def difference(a: Image.Image, b: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(a, b).getextrema())


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_generates_the_same_loaded_applied_and_merged(recipe_file, tmp_path, model_folder, variant):
    images = {"every": 100, "steps": 3, "prompts": [PROMPT]}
    file = recipe_file("run", tune=LORA | VARIANTS[variant], images=images, steps=6, optimizer={"lr": 3e-2})
    assert train_here(file) == 0
    trained = Image.open(tmp_path / "run" / "images" / "step-00000006" / "0.png")
    assert difference(trained, draw(Echo4oPipeline.from_pretrained(model_folder))) > 8, "it learned something"
    applied = Echo4oPipeline.from_pretrained(model_folder)
    applied.load_lora_weights(tmp_path / "run" / "adapter")
    assert difference(trained, draw(applied)) == 0
    merged = Echo4oPipeline.from_pretrained(merge_run(tmp_path / "run", tmp_path / "merged"))
    assert difference(trained, draw(merged)) <= 1
    if variant == "lora":
        script = tmp_path / "draw.py"
        script.write_text(DRAW)
        _fresh_process(script, model_folder, tmp_path / "run" / "adapter", tmp_path / "fresh.png")
        assert difference(trained, Image.open(tmp_path / "fresh.png")) == 0


def _fresh_process(script, *arguments):
    import os
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
@pytest.mark.parametrize("tune", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_images_of_a_run_are_those_of_the_averages_that_it_exports(recipe_file, tmp_path, model_folder, tune):
    images = {"every": 2, "steps": 3, "prompts": [PROMPT]}
    changes = {"images": images, "steps": 3, "ema": {"decay": 0.5}, "optimizer": {"lr": 3e-2}}
    changes |= {"checkpoints": {"every": 2}, "save_dtype": "float32"}
    assert train_here(recipe_file("run", tune=tune, **changes)) == 0
    (checkpoint,) = CheckpointFolder(tmp_path / "run" / "checkpoints").complete()
    for step, weights in ((3, None), (2, export_checkpoint(checkpoint, tmp_path / "early", "ema"))):
        generated = Image.open(tmp_path / "run" / "images" / f"step-{step:08d}" / "0.png")
        folder = weights or tmp_path / "run" / ("adapter" if tune is LORA else "pipeline")
        pipe = Echo4oPipeline.from_pretrained(model_folder if tune is LORA else folder, dtype=torch.float32)
        if tune is LORA:
            pipe.load_lora_weights(folder)
        assert difference(generated, draw(pipe)) == 0, step


def test_the_adapter_file_keeps_its_alpha(recipe_file, tmp_path):
    assert train_here(recipe_file("run", tune=LORA | {"rslora": True}, steps=2)) == 0
    with safe_open(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        assert all(name.startswith("transformer.layers.") for name in file.keys())
        assert len(file.keys()) == 2 * 7 * 2, "two matrices for each of seven, in two layers"
    assert settings["transformer.lora_alpha"] == 16 and settings["transformer.use_rslora"] is True


@pytest.mark.long
def test_what_is_frozen_stays_bit_by_bit(recipe_file, tmp_path, model_folder):
    before = weights_of(model_folder)
    for part in ("gen", "und", "text", "vision"):
        assert train_here(recipe_file(part, tune={"method": "full", "parts": [part]}, steps=3, batch_size=10)) == 0
        after = weights_of(tmp_path / part / "pipeline")
        changed = {part_of(name, CLASSES) for name in before if not torch.equal(before[name], after[name])}
        assert changed - {"gen"} == {part} - {"gen"} and (part == "gen") == ("gen" in changed), (part, changed)
    assert train_here(recipe_file("lora", tune=LORA, steps=3, save_dtype="float32")) == 0
    merged = weights_of(merge_run(tmp_path / "lora", tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed and all(".gen." in name for name in changed)


def test_every_part_has_its_parameters(tiny_pipeline, recipe_file):
    model = TrainedModel(make_backbone(tiny_pipeline))
    parts = {name: part_of(name, CLASSES) for name, _ in model.named_parameters()}
    assert parts["transformer.proj_in.weight"] == parts["transformer.norm_out.gen.weight"] == "gen"
    assert parts["transformer.norm_out.und.weight"] == "und" and parts["transformer.lm_head.weight"] == "text"
    set_up(model, load_recipe(recipe_file(tune={"method": "full", "parts": ["und"]})), CLASSES)
    assert {part_of(n, CLASSES) for n, p in model.named_parameters() if p.requires_grad} == {"und"}


@pytest.mark.long
def test_checkpoints_export_raw_and_averaged_weights_at_any_step(recipe_file, tmp_path):
    file = recipe_file("run", ema={"decay": 0.5}, checkpoints={"every": 2, "keep": 5})
    assert train_here(file) == 0
    first, last = CheckpointFolder(tmp_path / "run" / "checkpoints").complete()
    assert_same(weights_of(export_checkpoint(last, tmp_path / "out")), weights_of(tmp_path / "run" / "pipeline"))
    raw = weights_of(export_checkpoint(last, tmp_path / "raw", "raw"))
    early = weights_of(export_checkpoint(first, tmp_path / "early", "ema"))
    averaged = weights_of(tmp_path / "out")
    name = "transformer.proj_in.weight"
    assert not torch.equal(raw[name], averaged[name]) and not torch.equal(early[name], averaged[name])
    assert draw(Echo4oPipeline.from_pretrained(tmp_path / "raw")).size == (64, 64)


def test_an_incomplete_export_is_refused():
    with pytest.raises(ExportError, match="X would be incomplete: 1 missing \\(b\\) and 1 unexpected \\(c\\)"):
        check_keys("X", ["a", "b"], ["a", "c"])


@pytest.mark.long
def test_export_says_what_there_is(recipe_file, tmp_path):
    assert train_here(recipe_file("run", checkpoints={"every": 2}, tune=LORA)) == 0
    (_, last) = CheckpointFolder(tmp_path / "run" / "checkpoints").complete()
    with pytest.raises(RecipeError, match="has no average"):
        export_checkpoint(last, tmp_path / "out", "ema")
    adapter = export_checkpoint(last, tmp_path / "out")
    ours = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    for name, tensor in load_file(adapter / "pytorch_lora_weights.safetensors").items():
        assert torch.equal(tensor, ours[name])
    said = run("export", tmp_path / "run", "--step", 3, "--out", tmp_path / "no", code=2)
    assert "has no checkpoint of step 3; there are: 2, 4" in said


SMALL = {"device": "cpu", "steps": 2, "optimizer.warmup_steps": 0, "packing.tokens": 120, "packing.buffer": 4}


def small(name, tmp_path, model_folder, rows_folder, **changes) -> int:
    changes = SMALL | {"model": model_folder, "data.path": rows_folder, "output_dir": tmp_path / "run"} | changes
    changes |= {"packing.packs_per_step": 1}
    return train_here(name, *[part for pair in changes.items() for part in ("--set", "=".join(map(str, pair)))])


@pytest.mark.long
def test_the_lora_recipe_in_small(tmp_path, model_folder, rows_folder):
    images = {"images.every": 1, "images.steps": 2}
    assert small("lora_single_gpu", tmp_path, model_folder, rows_folder, **images) == 0
    weights = load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    assert weights and all(math.isfinite(float(tensor.sum())) for tensor in weights.values())
    assert (tmp_path / "run" / "run.html").read_text().count("data:image/png") == 5, "curves, and two pictures twice"


def test_the_qlora_recipe_in_small(tmp_path, model_folder, rows_folder, capsys):
    if torch.cuda.is_available():
        pytest.importorskip("bitsandbytes")
        assert small("qlora_24gb", tmp_path, model_folder, rows_folder, device="auto") == 0
        assert load_file(tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors")
    else:
        assert small("qlora_24gb", tmp_path, model_folder, rows_folder) == 2
        assert "tune.quantize: nf4 needs a GPU and bitsandbytes" in capsys.readouterr().err


def test_the_quickstarts_recipe_in_small(tmp_path, model_folder, rows_folder):
    changes = {"model": model_folder, "data.path": rows_folder, "output_dir": tmp_path / "run", "steps": 2}
    changes |= {
        "optimizer.warmup_steps": 1,
        "batch_size": 4,
        "validation.share": 0.4,
    }  # of 10 rows, 0.02 holds out none
    assert train_here("quickstart_cpu", *[p for c in changes.items() for p in ("--set", "=".join(map(str, c)))]) == 0
    before, after = weights_of(model_folder), weights_of(tmp_path / "run" / "pipeline")
    assert before.keys() == after.keys() and any(not torch.equal(before[n].float(), after[n].float()) for n in before)
