"""Training of OmniGen2: samples, packs without padding, adapters, caches, resumed and distributed runs, plans."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from echo4o.modeling.omnigen2.convert import convert_to_diffusers
from echo4o.modeling.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline
from echo4o.modeling.omnigen2.prompts_omnigen2 import DROPPED_SYSTEM_PROMPT, prompt_text
from echo4o.training import precompute as precompute_module
from echo4o.training.backbones.omnigen2 import OmniGen2Backbone, collate
from echo4o.training.backbones.omnigen2_recipe import OmniGen2Recipe
from echo4o.training.precompute import CacheError, precompute
from echo4o.training.train import Trainer
from tests.modeling.omnigen2_models import CHECKPOINT, golden_pipeline

from .conftest import make_rows, picture, row
from .running import assert_same, log_of, losses_of, torchrun, weights_of

SMALL = {"max_input_pixels": [4096, 1024], "max_output_pixels": 4096, "max_side_length": 96}
LORA = {"method": "lora", "rank": 4, "alpha": 4}


def recipe(folder: Path, **changes) -> OmniGen2Recipe:
    values = {"backbone": "omnigen2", "model": "unused", "output_dir": folder, "data": {"path": "unused"}, "steps": 4}
    values |= {"batch_size": 2, "device": "cpu", "save_dtype": "float32", "objective": SMALL}
    values |= {"optimizer": {"lr": 1e-3}}
    return OmniGen2Recipe.model_validate({k: v for k, v in (values | changes).items() if v is not None})


@pytest.fixture
def pipe():
    return golden_pipeline()


@pytest.fixture
def backbone(pipe, tmp_path):
    return OmniGen2Backbone(pipe, recipe(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("omnigen2") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


# --- rows and samples ---


def test_rows_become_states_and_moments(backbone):
    (prepared,) = backbone.prepare([row(0, references=2)])
    assert len(prepared.texts) == 1 and not prepared.is_text_to_image
    assert torch.equal(prepared.texts[0], backbone.text_states(prompt_text("a red square")))
    assert [tuple(m.shape) for m in prepared.reference_moments] == [(32, 2, 4), (32, 2, 4)]  # 1024 pixels for two
    (plain,) = backbone.prepare([row(0) | {"instruction": "The image shows a square. The image shows it."}])
    assert plain.is_text_to_image and len(plain.texts) == 2
    assert torch.equal(plain.texts[1], backbone.text_states(prompt_text("a square. it.")))


def test_samples_depend_on_row_and_epoch_alone(backbone):
    prepared = backbone.prepare([row(i, references=i % 3) for i in range(3)])
    first, again, next_epoch = (backbone.sample(prepared[2], epoch) for epoch in (0, 0, 1))
    assert torch.equal(first.noise, again.noise) and torch.equal(first.references[0], again.references[0])
    assert not torch.equal(first.noise, next_epoch.noise) and first.raw_time != next_epoch.raw_time


def test_dropped_prompts_and_references(pipe, tmp_path):
    always = OmniGen2Backbone(pipe, recipe(tmp_path, objective=SMALL | {"prompt_dropout": 1, "reference_dropout": 1}))
    (prepared,) = always.prepare([row(1, references=2)])
    sample = always.sample(prepared, 0)
    assert torch.equal(sample.text, always.text_states(prompt_text("", DROPPED_SYSTEM_PROMPT)))
    assert sample.references == [] and sample.full_length > len(sample)
    half = OmniGen2Backbone(pipe, recipe(tmp_path, objective=SMALL | {"prompt_dropout": 0.5}))
    (prepared,) = half.prepare([row(1, references=1)])
    samples = [half.sample(prepared, epoch) for epoch in range(200)]
    dropped = [s for s in samples if torch.equal(s.text, half.dropped_states)]
    assert 70 < len(dropped) < 130 and 0.3 < sum(not s.references for s in dropped) / len(dropped) < 0.7
    assert all(s.references for s in samples if len(s.text) != len(half.dropped_states))


def test_rows_that_cannot_train(backbone):
    many = row(0) | {"reference_images": [picture("red")] * 6}
    small = row(0) | {"image": picture("red", (8, 8))}
    for wrong, words in (
        (many, "6 references; the model takes at most 5"),
        (small, "both sides must be 16"),
        (row(0) | {"answer": "a square"}, "has an answer"),
        (row(0) | {"instruction": None}, "its instruction is None"),
    ):
        with pytest.raises(ValueError, match=words):
            backbone.prepare([wrong])
    (five,) = backbone.prepare([row(0) | {"reference_images": [picture("red")] * 5}])
    assert len(five.reference_moments) == 5


def test_a_batch_has_no_padding_and_equals_its_samples_alone(backbone):
    backbone.pipeline.transformer.eval()
    rows = backbone.prepare([row(i, references=i % 3, size=(64, 32 + 16 * i)) for i in range(4)])
    samples = [backbone.sample(r, 0) for r in rows]
    batch = collate(samples)
    seen = []
    transformer = backbone.pipeline.transformer
    hook = transformer.layers[0].register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with torch.no_grad():
        term = backbone.losses(backbone.pipeline, batch)["mse"]
        alone = [backbone.losses(backbone.pipeline, collate([sample]))["mse"].values for sample in samples]
    hook.remove()
    assert seen[0] == batch.num_tokens == sum(map(len, samples))
    for index, values in enumerate(alone):
        assert torch.allclose(term.values[term.sample == index], values, atol=1e-4)
    counts = batch.counts
    assert backbone.flops(batch) > transformer.forward_flops(counts) > transformer.forward_flops(counts, True) > 0


# --- runs ---


def trained(folder: Path, pipe, rows, **changes):
    return Trainer(recipe(folder, **changes), pipe, rows).run()


def draw(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "np"}
    return pipe("a red square", generator=torch.Generator().manual_seed(0), **options).images


def test_an_adapter_trains_and_is_loaded_again(tmp_path, rows, pipe):
    before = draw(pipe)
    base = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    result = trained(tmp_path / "run", pipe, rows, tune=LORA, optimizer={"lr": 1e-2}, steps=6)
    losses = [entry["loss"] for entry in result.log]
    assert all(np.isfinite(losses)) and len(set(losses)) == 6
    fresh = golden_pipeline()
    assert all(torch.equal(p, base[name]) for name, p in fresh.transformer.state_dict().items())
    fresh.load_lora_weights(result.pipeline_dir)
    assert fresh.transformer.peft_config["default_0"].r == 4
    assert np.abs(draw(fresh) - before).max() > 1e-3


@pytest.mark.long
def test_a_small_model_learns_a_fixed_batch(tmp_path, rows, pipe):
    one = rows.select([0])
    result = trained(tmp_path, pipe, one, batch_size=1, steps=60, optimizer={"lr": 3e-3, "weight_decay": 0.01})
    losses = [entry["loss"] for entry in result.log]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.long
def test_micro_batches_and_packs_give_the_same_step(tmp_path, rows):
    logs = []
    for name, changes in {
        "whole": {"batch_size": 4},
        "micro": {"batch_size": 4, "micro_batch_size": 1},
        "checkpointed": {"batch_size": 4, "gradient_checkpointing": True},
    }.items():
        logs.append([e["loss"] for e in trained(tmp_path / name, golden_pipeline(), rows, steps=2, **changes).log])
    assert np.allclose(logs[0], logs[1], rtol=1e-4) and np.allclose(logs[0], logs[2], rtol=1e-4)
    packing = {"tokens": 200, "packs_per_step": 2, "buffer": 4}
    log = trained(tmp_path / "packed", golden_pipeline(), rows, batch_size=None, packing=packing, steps=2).log
    assert all(entry["tokens"] <= 400 for entry in log)


@pytest.mark.long
def test_a_resumed_run_is_the_same_run(tmp_path, rows):
    changes = {"checkpoints": {"every": 2}, "ema": {"decay": 0.9, "copy_first": True}}
    trained(tmp_path / "whole", golden_pipeline(), rows, steps=4, **changes)
    trained(tmp_path / "parts", golden_pipeline(), rows, steps=2, **changes)
    trained(tmp_path / "parts", golden_pipeline(), rows, steps=4, resume=True, **changes)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert_same(weights_of(tmp_path / "parts/pipeline"), weights_of(tmp_path / "whole/pipeline"))


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_replaces_both_encoders_bit_for_bit(tmp_path, rows, packed, monkeypatch):
    rows = rows.map(lambda r: {"instruction": f"The image shows {r['instruction']}"})
    changes = {"batch_size": None, "packing": {"tokens": 200, "packs_per_step": 2, "buffer": 4}} if packed else {}
    live = trained(tmp_path / "live", golden_pipeline(), rows, **changes)
    pipe = golden_pipeline()
    precompute(rows, OmniGen2Backbone(pipe, recipe(tmp_path)), tmp_path / "cache", rows_per_file=3)
    monkeypatch.setattr(pipe.vae, "encode", None)
    monkeypatch.setattr(pipe.mllm.model.language_model, "forward", None)
    cached = trained(tmp_path / "cached", pipe, rows, latents=tmp_path / "cache", **changes)
    assert [e["loss"] for e in cached.log] == [e["loss"] for e in live.log]


def test_a_cache_of_other_settings_or_instructions_is_refused(tmp_path, rows, pipe):
    precompute(rows, OmniGen2Backbone(pipe, recipe(tmp_path)), tmp_path / "cache")
    other = recipe(tmp_path / "a", latents=tmp_path / "cache", objective=SMALL | {"max_output_pixels": 2048})
    with pytest.raises(CacheError, match="max_output_pixels: 4096 there, 2048 here"):
        Trainer(other, pipe, rows)
    renamed = rows.map(lambda r: {"instruction": "something else"})
    with pytest.raises(ValueError, match="another instruction"):
        trained(tmp_path / "b", golden_pipeline(), renamed, latents=tmp_path / "cache")


# --- by the command line ---


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omnigen2-data") / "rows"
    make_rows().save_to_disk(folder)
    return folder


def recipe_file(tmp_path: Path, folder: Path, rows_folder: Path, **changes) -> Path:
    values = {"backbone": "omnigen2", "model": str(folder), "output_dir": str(tmp_path / "run"), "steps": 3}
    values |= {"data": {"path": str(rows_folder)}, "batch_size": 4, "device": "cpu", "save_dtype": "float32"}
    values |= {"objective": SMALL, "optimizer": {"lr": 1e-3}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values | changes))
    return file


def test_the_precompute_command_takes_the_settings_of_the_recipe(tmp_path, folder, rows_folder):
    changes = {f"objective.{name}": value for name, value in SMALL.items()}
    assert precompute_module.run(str(rows_folder), str(folder), tmp_path / "cache", changes=changes) == 8
    about = precompute_module.read_about(tmp_path / "cache")
    assert about["max_input_pixels"] == [4096, 1024] and about["mllm_dtype"] == "float32"
    from echo4o.cli.precompute import _recipe

    assert _recipe(str(folder)) == "omnigen2_lora_single_gpu"


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_processes_equal_one(tmp_path, folder, rows_folder):
    logs = []
    for processes in (1, 2):
        own = tmp_path / str(processes)
        own.mkdir()
        file = recipe_file(own, folder, rows_folder, tune=LORA)
        torchrun(processes, "echo4o.training.train", file)
        logs.append(log_of(own / "run"))
    for one, two in zip(*logs, strict=True):
        assert np.isclose(one["loss"], two["loss"], rtol=1e-5) and one["tokens"] == two["tokens"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_sharded_runs_equal_replicated_ones(tmp_path, folder, rows_folder):
    packing = {"tokens": 200, "packs_per_step": 2, "buffer": 4}
    logs, weights = [], []
    for name, sharding in (("plain", "none"), ("sharded", "fsdp2")):
        own = tmp_path / name
        own.mkdir()
        changes = {"batch_size": None, "packing": packing, "sharding": sharding, "processes": 2}
        file = recipe_file(own, folder, rows_folder, **changes)
        torchrun(2, "tests.training.force_fsdp2", file)
        logs.append([entry["loss"] for entry in log_of(own / "run")])
        weights.append(weights_of(own / "run/pipeline/transformer"))
    assert np.allclose(logs[0], logs[1], rtol=1e-4)
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-3) for n in weights[0])
    pipe = OmniGen2Pipeline.from_pretrained(tmp_path / "sharded/run/pipeline")
    assert np.isfinite(draw(pipe)).all()


# --- plans ---


@pytest.mark.long
def test_plans_of_the_release(capsys):
    from echo4o.planning.training_memory import plan, skeleton
    from echo4o.training.recipe_files import load_recipe

    lora = load_recipe("omnigen2_lora_single_gpu", {"model": "release"})
    built = skeleton(lora)
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in built.components.items()}
    assert counts["vae"] == 83_819_683 and counts["mllm"] == 3_754_622_976
    memory = plan(lora, 80e9, 1, built)
    # bf16 weights of the transformer and of the language model, float32 of the VAE and of the adapter
    expected = 2 * 3_967_161_400 + 2 * 3_754_622_976 + 4 * 83_819_683 + 4 * 5_107_200
    assert memory.weights == pytest.approx(expected, rel=1e-3)
    cached = plan(load_recipe("omnigen2_lora_single_gpu", {"model": "release", "latents": "cache"}), 80e9, 1)
    assert memory.weights - cached.weights == pytest.approx(2 * 3_754_622_976)
    full = plan(load_recipe("omnigen2_full_fsdp2_8gpu", {"model": "release"}), 80e9, 8)
    states = full.weights + full.gradients + full.optimizer - 2 * 3_754_622_976 - 4 * 83_819_683
    assert states == pytest.approx(63.5e9 / 8, rel=0.02)  # float32 weights, gradients, two moments


def test_generation_plans():
    from echo4o.planning.generation_memory import make_plan, read_stored
    from echo4o.training.backbones.base import ImageCall

    release = make_plan(read_stored("release:omnigen2"), 24e9, ImageCall(1024, 1024))
    assert release.model == "release:omnigen2" and release.weights["mllm"]["parameters"] == 3_754_622_976
    assert release.memory.branches == 3 and release.recommended is not None
    with pytest.raises(ValueError, match="takes 5 per prompt"):
        make_plan(read_stored("release:omnigen2"), 24e9, ImageCall(1024, 1024, references=6))


def test_recipes_say_what_is_wrong():
    from echo4o.training.recipe import RecipeError
    from echo4o.training.recipe_files import load_recipe

    for changes, words in (
        ({"tune.experts": ["gen"]}, "tune.experts"),
        ({"objective.time_shift": "v3"}, "objective.time_shift"),
        ({"objective.max_input_pixels": [0]}, "must be above 0"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe("omnigen2_lora_single_gpu", changes)


def test_the_original_initialisation_is_the_default(pipe):
    from echo4o.training.model import lora_config

    settings = recipe(Path("unused"), tune={"method": "lora"}).tune
    config = lora_config(settings, type(pipe.transformer))
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 8.0, "gaussian")
    model = copy.deepcopy(pipe.transformer)
    model.add_adapter(config)
    values = torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])
    assert abs(float(values.detach().std()) * 8 - 1) < 0.05  # N(0, 1/r)


@pytest.mark.long
def test_validation_gives_the_same_numbers_for_any_batch(tmp_path, rows):
    """Held-out rows with references and without; the losses fall from noise to data for no seed of the run."""
    results = []
    for name, changes in (("a", {"micro_batch_size": 1}), ("b", {"seed": 7})):
        validation = {"share": 0.65, "every": 1, "times": 3}
        file = tmp_path / name
        options = {"validation": validation, "images": {"every": 9, "steps": 1, "validation_rows": 1}, "batch_size": 2}
        results.append(trained(file, golden_pipeline(dtype=torch.float32), rows, steps=1, **options, **changes))
        assert list((file / "images" / "step-00000001").glob("*.png"))
    first, second = (result.validations[0] for result in results)
    assert list(first.flat().values()) == pytest.approx(list(second.flat().values()), abs=1e-5)
    assert set(first.times) == {"0.166667", "0.5", "0.833333"} and first.rows > 0
