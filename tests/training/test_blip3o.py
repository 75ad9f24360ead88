"""Training of BLIP3-o: rows and samples, the frozen parts, adapters, caches, resumed and distributed runs."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import load_from_disk

from echo4o.modeling.blip3o.convert import convert_to_diffusers
from echo4o.modeling.blip3o.pipeline_blip3o import Blip3oPipeline
from echo4o.modeling.blip3o.prompts_blip3o import generation_text
from echo4o.training import precompute as precompute_module
from echo4o.training.backbones.blip3o import Blip3oBackbone, Blip3oRecipe, collate
from echo4o.training.precompute import CacheError, precompute
from echo4o.training.recipe import RecipeError
from echo4o.training.train import Trainer

from .conftest import make_rows, row
from .running import assert_same, log_of, losses_of, torchrun, train_here, weights_of

CHECKPOINT = Path(__file__).parents[1] / "parity" / "golden_blip3o" / "checkpoint"
LORA = {"method": "lora", "rank": 4, "alpha": 4}


def recipe(folder: Path, **changes) -> Blip3oRecipe:
    values = {"backbone": "blip3o", "model": "unused", "output_dir": folder, "data": {"path": "unused"}, "steps": 4}
    values |= {"batch_size": 2, "device": "cpu", "save_dtype": "float32", "optimizer": {"lr": 1e-3}}
    return Blip3oRecipe.model_validate({k: v for k, v in (values | changes).items() if v is not None})


def golden_pipeline() -> Blip3oPipeline:
    pipe = Blip3oPipeline.from_original(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shared():
    """A pipeline that tests leave as they found it."""
    return golden_pipeline()


@pytest.fixture
def backbone(shared, tmp_path):
    return Blip3oBackbone(shared, recipe(tmp_path))


@pytest.fixture
def rows():
    """Eight rows without references."""
    plain = make_rows()
    return plain.select([i for i, task in enumerate(plain["task"]) if task == "text_to_image"] * 2).map(
        lambda r, i: {"id": f"row-{i}"}, with_indices=True
    )


# --- rows and samples ---


def test_rows_become_tokens_and_features(backbone, shared):
    (prepared,) = backbone.prepare([row(0)])
    side = shared.transformer.config.sample_size
    assert prepared.features.shape == (shared.transformer.config.in_channels, side, side)
    assert torch.equal(prepared.features.flatten(1).T, shared.encode_image(row(0)["image"]))
    assert prepared.states is None and prepared.tokens[-1] == shared.token_ids.image_start


def test_the_templates_of_training_and_generation(shared, tmp_path):
    """Released: training closes the empty answer, generation does not (surprise 1). Matched: both as generation."""
    texts = {}
    for template in ("released", "matched"):
        own = Blip3oBackbone(shared, recipe(tmp_path, objective={"template": template}))
        texts[template] = shared.tokenizer.decode(own.token_ids("a cube"))
    assert texts["matched"] == generation_text("a cube") + "[IMG]"
    assert texts["released"] == generation_text("a cube") + "<|im_end|>\n[IMG]"
    assert Blip3oRecipe.model_fields["objective"].default.template == "released"


def test_long_captions_are_cut_as_in_the_original(backbone, shared):
    tokens = backbone.token_ids("cat " * 500)
    assert len(tokens) == shared.config.tokenizer_max_length - shared.transformer.config.num_queries


def test_frozen_queries_give_the_states_of_generation(shared, tmp_path):
    own = Blip3oBackbone(shared, recipe(tmp_path, tune=LORA, objective={"template": "matched"}))
    (prepared,) = own.prepare([row(0)])
    with torch.no_grad():
        want = shared.encode_texts([generation_text(row(0)["instruction"])])[0]
    assert torch.equal(prepared.states, want)


def test_samples_depend_on_row_and_epoch_alone(backbone):
    first, second = backbone.prepare([row(0), row(1)])
    a, b, later = backbone.sample(first, 0), backbone.sample(first, 0), backbone.sample(first, 1)
    assert torch.equal(a.noise, b.noise) and a.u == b.u and a.dropped == b.dropped
    assert not torch.equal(a.noise, later.noise) and a.u != later.u
    assert not torch.equal(a.noise, backbone.sample(second, 0).noise)


def test_times_are_uniform_whole_numbers_and_conditions_are_dropped(backbone):
    (prepared,) = backbone.prepare([row(0)])
    samples = [backbone.sample(prepared, epoch) for epoch in range(2000)]
    times = backbone.table.timesteps[backbone.table.index(torch.stack([s.u for s in samples]))]
    assert torch.allclose(times, times.round(), atol=1e-3)
    assert 0.999 < times.min() and times.max() < 1000.001
    assert abs(float(times.mean()) - 500.5) < 25
    assert 0.07 < sum(s.dropped for s in samples) / len(samples) < 0.13


def test_dropped_conditions_are_zero_and_give_queries_no_gradient(shared, tmp_path):
    own = Blip3oBackbone(shared, recipe(tmp_path, objective={"condition_dropout": 1}))
    shared.language_model.requires_grad_(False)
    head = copy.deepcopy(shared.transformer)
    seen = []
    head.caption_projection.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    batch = collate([own.sample(prepared, 0) for prepared in own.prepare([row(0), row(1)])])
    model = type("Model", (), {"transformer": head})
    own.losses(model, batch)["mse"].weighted_sum().backward()
    assert not seen[0].any()
    assert head.queries.weight.grad is not None and not head.queries.weight.grad.any()
    assert head.layers[0].gate.grad.any()


def test_a_batch_equals_its_samples_alone(backbone, shared):
    captions = ("a", "a red square and a very long description of it", "two")
    prepared = backbone.prepare([row(i) | {"instruction": text} for i, text in enumerate(captions)])
    samples = [backbone.sample(p, 0) for p in prepared]
    with torch.no_grad():
        term = backbone.losses(shared, collate(samples))["mse"]
        for index, sample in enumerate(samples):
            alone = backbone.losses(shared, collate([sample]))["mse"].values
            assert torch.allclose(term.values[term.sample == index], alone, atol=1e-4)
    assert backbone.flops(collate(samples)) > 3 * shared.transformer.flops(1)


def test_validation_samples_have_the_times_asked_for(backbone):
    (prepared,) = backbone.prepare([row(0)])
    samples = backbone.validation_samples(prepared, [0.1, 0.5, 0.9])
    times = backbone.table.timesteps[backbone.table.index(torch.stack([s.u for s in samples]))]
    assert torch.allclose(times, torch.tensor([100.0, 500.0, 900.0]), atol=1.01)
    assert torch.equal(samples[0].noise, samples[2].noise) and not any(s.dropped for s in samples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": None}, "its instruction is None"),
        ({"answer": "a cat"}, "it has an answer"),
        ({"reference_images": [None]}, "it has 1 references; BLIP3-o trains text to image only"),
    ],
)
def test_rows_that_cannot_train_are_errors(backbone, changes, message):
    with pytest.raises(ValueError, match=message):
        backbone.prepare([row(0) | changes])


# --- runs ---


def trained(folder: Path, pipe, rows, **changes):
    return Trainer(recipe(folder, **changes), pipe, rows).run()


def features_of(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red square", generator=generator, feature_steps=2, output_type="features").images


def test_rows_with_references_are_refused_by_name_and_count(tmp_path, shared):
    with pytest.raises(
        RecipeError, match=r"row-1, row-3, row-5 and 1 more have references \(4 in all\).*text to image"
    ):
        Trainer(recipe(tmp_path), shared, make_rows())


def test_the_tower_is_needed_to_train(tmp_path, rows, shared):
    without = Blip3oPipeline(**{n: c for n, c in shared.components.items() if n != "vision_model"})
    with pytest.raises(RecipeError, match="EVA-CLIP"):
        Blip3oBackbone(without, recipe(tmp_path)).prepare([row(0)])


@pytest.mark.long
def test_head_and_queries_train_and_nothing_else(tmp_path, rows):
    pipe = golden_pipeline()
    before = {n: m.state_dict() for n, m in copy.deepcopy(pipe.components).items() if isinstance(m, torch.nn.Module)}
    result = trained(tmp_path, pipe, rows)
    losses = [entry["loss"] for entry in result.log]
    assert all(np.isfinite(losses)) and len(set(losses)) == 4
    changed = {n for n, p in pipe.transformer.named_parameters() if not torch.equal(p, before["transformer"][n])}
    assert changed == set(before["transformer"])
    for name in ("language_model", "vision_model", "unet", "vae"):
        state = getattr(pipe, name).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in before[name].items())


@pytest.mark.long
def test_parts_can_stay_frozen(tmp_path, rows):
    pipe = golden_pipeline()
    before = copy.deepcopy(pipe.transformer.state_dict())
    trained(tmp_path, pipe, rows, tune={"method": "full", "parts": ["head"]})
    after = pipe.transformer.state_dict()
    assert [n for n in before if torch.equal(before[n], after[n])] == ["queries.weight"]


@pytest.mark.long
def test_an_adapter_trains_and_is_loaded_again(tmp_path, rows):
    pipe = golden_pipeline()
    result = trained(tmp_path / "run", pipe, rows, tune=LORA | {"targets": "all"}, optimizer={"lr": 1e-2}, steps=6)
    fresh = golden_pipeline()
    before = features_of(fresh)
    fresh.load_lora_weights(result.pipeline_dir)
    changed = features_of(fresh)
    assert (changed - before).abs().max() > 1e-3
    fresh.unload_lora_weights()
    assert torch.equal(features_of(fresh), before)


@pytest.mark.long
def test_a_small_model_learns_a_fixed_batch(tmp_path, rows):
    result = trained(tmp_path, golden_pipeline(), rows.select([0]), batch_size=1, steps=80, optimizer={"lr": 3e-3})
    losses = [entry["loss"] for entry in result.log]
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:5])


@pytest.mark.long
def test_micro_batches_packs_and_checkpointing_give_the_same_step(tmp_path, rows):
    logs = []
    for name, changes in {
        "whole": {"batch_size": 4},
        "micro": {"batch_size": 4, "micro_batch_size": 1},
        "checkpointed": {"batch_size": 4, "gradient_checkpointing": True},
    }.items():
        logs.append([e["loss"] for e in trained(tmp_path / name, golden_pipeline(), rows, steps=2, **changes).log])
    assert np.allclose(logs[0], logs[1], rtol=1e-4) and np.allclose(logs[0], logs[2], rtol=1e-4)
    packing = {"tokens": 400, "packs_per_step": 2, "buffer": 4}
    log = trained(tmp_path / "packed", golden_pipeline(), rows, batch_size=None, packing=packing, steps=2).log
    assert all(entry["tokens"] <= 800 for entry in log)


@pytest.mark.long
def test_a_resumed_run_is_the_same_run(tmp_path, rows):
    changes = {"checkpoints": {"every": 2}, "ema": {"decay": 0.9}}
    trained(tmp_path / "whole", golden_pipeline(), rows, steps=4, **changes)
    trained(tmp_path / "parts", golden_pipeline(), rows, steps=2, **changes)
    trained(tmp_path / "parts", golden_pipeline(), rows, steps=4, resume=True, **changes)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    assert_same(weights_of(tmp_path / "parts/pipeline"), weights_of(tmp_path / "whole/pipeline"))


@pytest.mark.long
@pytest.mark.parametrize("tune", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_a_cache_replaces_the_frozen_models_bit_for_bit(tmp_path, rows, tune, monkeypatch):
    live = trained(tmp_path / "live", golden_pipeline(), rows, tune=tune)
    pipe = golden_pipeline()
    precompute(rows, Blip3oBackbone(pipe, recipe(tmp_path, tune=tune)), tmp_path / "cache", rows_per_file=3)
    monkeypatch.setattr(pipe.vision_model, "forward", None)
    if tune is LORA:  # trained queries need the language model at every step
        monkeypatch.setattr(pipe.language_model.model.language_model, "forward", None)
    cached = trained(tmp_path / "cached", pipe, rows, tune=tune, latents=tmp_path / "cache")
    assert [e["loss"] for e in cached.log] == [e["loss"] for e in live.log]


@pytest.mark.long
def test_caches_of_other_settings_or_instructions_are_refused(tmp_path, rows, shared):
    precompute(rows, Blip3oBackbone(shared, recipe(tmp_path, tune=LORA)), tmp_path / "cache")
    other = recipe(tmp_path / "a", tune=LORA, latents=tmp_path / "cache", objective={"template": "matched"})
    with pytest.raises(CacheError, match="template: released there, matched here"):
        Trainer(other, golden_pipeline(), rows)
    renamed = rows.map(lambda r: {"instruction": "something else"})
    with pytest.raises(ValueError, match="another instruction"):
        trained(tmp_path / "b", golden_pipeline(), renamed, tune=LORA, latents=tmp_path / "cache")
    # A cache with states also serves training of the queries, which reads the features alone.
    trained(tmp_path / "c", golden_pipeline(), rows, latents=tmp_path / "cache", steps=1)


# --- by the command line ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip3o-model") / "pipeline"
    convert_to_diffusers(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip3o-data") / "rows"
    make_rows().save_to_disk(folder)
    return folder


def recipe_file(tmp_path: Path, folder: Path, rows_folder: Path, **changes) -> Path:
    values = {"backbone": "blip3o", "model": str(folder), "output_dir": str(tmp_path / "run"), "steps": 3}
    values |= {"data": {"path": str(rows_folder), "where": {"task": "text_to_image"}}, "batch_size": 4}
    values |= {"device": "cpu", "save_dtype": "float32", "optimizer": {"lr": 1e-3}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values | changes))
    return file


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tune", [LORA, {"method": "full"}], ids=["lora", "full"])
def test_two_processes_equal_one(tmp_path, folder, rows_folder, tune):
    logs = []
    for processes in (1, 2):
        own = tmp_path / str(processes)
        own.mkdir()
        torchrun(processes, "echo4o.training.train", recipe_file(own, folder, rows_folder, tune=tune))
        logs.append(log_of(own / "run"))
    for one, two in zip(*logs, strict=True):
        assert np.isclose(one["loss"], two["loss"], rtol=1e-5) and one["tokens"] == two["tokens"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_sharded_runs_equal_replicated_ones(tmp_path, folder, rows_folder):
    logs, weights = [], []
    for name, sharding in (("plain", "none"), ("sharded", "fsdp2")):
        own = tmp_path / name
        own.mkdir()
        file = recipe_file(own, folder, rows_folder, sharding=sharding, processes=2)
        torchrun(2, "tests.training.force_fsdp2", file)
        logs.append([entry["loss"] for entry in log_of(own / "run")])
        weights.append(weights_of(own / "run/pipeline/transformer"))
    assert np.allclose(logs[0], logs[1], rtol=1e-4)
    assert all(torch.allclose(weights[0][n], weights[1][n], atol=1e-3) for n in weights[0])
    pipe = Blip3oPipeline.from_pretrained(tmp_path / "sharded/run/pipeline")
    assert torch.isfinite(features_of(pipe)).all()


@pytest.mark.long
def test_the_precompute_command_stores_what_the_recipe_needs(tmp_path, folder, rows_folder):
    """It reads no weights of the head but the queries."""
    plain = tmp_path / "rows"
    rows = load_from_disk(str(rows_folder))
    rows.select([i for i, task in enumerate(rows["task"]) if task == "text_to_image"]).save_to_disk(plain)
    changes = {"tune.method": "lora"}
    assert precompute_module.run(str(plain), str(folder), tmp_path / "cache", changes=changes) == 4
    losses = []
    for name, latents in (("live", {}), ("cached", {"latents": str(tmp_path / "cache")})):
        own = tmp_path / name
        own.mkdir()
        file = recipe_file(own, folder, plain, tune=LORA, data={"path": str(plain)}, **latents)
        assert train_here(file) == 0
        losses.append(losses_of(own / "run"))
    assert losses[0] == losses[1]


# --- plans ---


@pytest.mark.long
def test_plans_of_the_release():
    from echo4o.planning.training_memory import plan, skeleton
    from echo4o.training.recipe_files import load_recipe

    def planned(name: str, **changes):
        settings = load_recipe(name, {"model": "release"} | changes)
        return plan(settings, 80e9, settings.processes, skeleton(settings))

    head, queries, language = 1_365_010_336, 229_376, 7_612_777_984 + 676_550_144
    lora = planned("blip3o_lora_single_gpu")
    adapter = lora.gradients / 4
    assert lora.weights == pytest.approx(2 * (head + queries + language + 4_350_208_256) + 4 * adapter, rel=1e-3)
    cached = planned("blip3o_lora_single_gpu", latents="cache")
    assert cached.weights == pytest.approx(2 * (head + queries) + 4 * adapter, rel=1e-3)
    full = planned("blip3o_full_8gpu", latents="cache")
    states = full.weights + full.gradients + full.optimizer
    assert states == pytest.approx(16 * (head + queries) + 2 * language, rel=1e-3)
    small = planned("blip3o_full_8gpu", latents="cache", quantize_language_model="nf4")
    assert 9.5e9 < full.weights - small.weights < 11e9  # three quarters of 14 GB of matrices in 16 bit
    sharded = planned("blip3o_full_8gpu", latents="cache", sharding="fsdp2")
    assert full.total - sharded.total > 15e9


@pytest.mark.long
def test_plans_of_a_call():
    from echo4o.planning.generation_memory import make_plan, read_stored
    from echo4o.training.backbones.base import ImageCall

    release = make_plan(read_stored("release:blip3o"), 24e9, ImageCall(1024, 1024, references=0))
    assert release.weights["unet"]["parameters"] == 2_525_520_644
    # with the position table: a parameter here, a buffer in BAGEL
    assert release.weights["vision_model"]["parameters"] == 4_350_208_256
    assert release.recommended is not None
    with pytest.raises(ValueError, match="from text only"):
        make_plan(read_stored("release:blip3o"), 24e9, ImageCall(1024, 1024, references=1))


def test_settings_without_effect_are_errors():
    from echo4o.training.recipe_files import load_recipe

    for changes, words in (
        ({"tune.targets": "queries"}, "tune.targets"),
        ({"objective.template": "both"}, "objective.template"),
        ({"objective.condition_dropout": 2}, "condition_dropout"),
        ({"latents": "cache", "quantize_language_model": "nf4"}, "quantize_language_model has no effect"),
    ):
        with pytest.raises(RecipeError, match=words):
            load_recipe("blip3o_lora_single_gpu", changes)
