"""The trainer on a tiny random model: it learns, stops on bad numbers, and what it saves loads."""

import copy
import json

import pytest
import torch
import yaml

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.training.backbones.bagel import BagelRecipe, collate
from echo4o.training.backbones.base import LossTerm
from echo4o.training.data import SampledOrder
from echo4o.training.model import TrainedModel
from echo4o.training.optimizers import Muon
from echo4o.training.packing import FixedBatches, best_fit
from echo4o.training.recipe import RecipeError
from echo4o.training.recipe_files import bundled_names, bundled_recipe, dump_recipe, load_recipe, parse_changes
from echo4o.training.step import weighted_loss
from echo4o.training.train import NonFiniteLoss, Trainer, learning_rate_factor, main

from .conftest import make_backbone, row


def recipe(tmp_path, **changes) -> BagelRecipe:
    values = {
        "model": "unused",
        "output_dir": tmp_path / "run",
        "data": {"path": "unused"},
        "optimizer": {"name": "muon", "lr": 3e-3, "muon_lr": 1e-2},
        "steps": 20,
        "batch_size": 8,
        "device": "cpu",
    }
    return BagelRecipe.model_validate(values | changes)


@pytest.mark.long
@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_twenty_steps_lower_the_loss(tmp_path, tiny_pipeline, rows, name):
    optimizer = {"name": name, "lr": 3e-3} | ({"muon_lr": 1e-2} if name == "muon" else {})
    result = Trainer(recipe(tmp_path, optimizer=optimizer), tiny_pipeline, rows).run()
    losses = [entry["mse"] for entry in result.log]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    lines = (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(20))


def test_saved_folder_generates(tmp_path, tiny_pipeline, rows):
    result = Trainer(recipe(tmp_path, steps=2), tiny_pipeline, rows).run()
    loaded = Echo4oPipeline.from_pretrained(result.pipeline_dir)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded("a red square", num_inference_steps=2).images[0].size == (64, 64)


def test_accumulation_and_processes_see_the_same_samples(tmp_path, tiny_pipeline, rows):
    """Losses of a step do not depend on how its samples are split."""
    whole = Trainer(recipe(tmp_path, steps=3), tiny_pipeline, rows)
    place = (whole.batches.rows, 8, None, whole.backbone.collate)
    ranks = [FixedBatches(*place, rank, 2) for rank in range(2)]
    dealt = sorted(i for source in ranks for batch in source.next_step() for i in batch.ids)
    assert dealt == sorted(i for batch in whole.batches.next_step() for i in batch.ids)


@pytest.mark.long
def test_accumulation_changes_nothing(tmp_path, rows, tiny_pipeline):
    models = (tiny_pipeline.transformer, tiny_pipeline.vision_model)
    states = [copy.deepcopy(model.state_dict()) for model in models]
    losses = []
    for micro in (None, 2):
        for model, state in zip(models, states):
            model.load_state_dict(state)
        options = {"micro_batch_size": micro, "save_dtype": "float32", "optimizer": {"lr": 1e-3}}
        run = Trainer(recipe(tmp_path, steps=3, **options), tiny_pipeline, rows).run()
        losses.append([entry["loss"] for entry in run.log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_non_finite_loss_names_its_samples(tmp_path, tiny_pipeline, rows):
    trainer = Trainer(recipe(tmp_path), tiny_pipeline, rows)
    backbone = trainer.backbone
    prepare = backbone.prepare

    def spoiled(new):
        made = prepare(new)
        for prepared in made:
            if prepared.id == "row-5":
                prepared.moments.fill_(float("inf"))
        return made

    backbone.prepare = spoiled
    with pytest.raises(NonFiniteLoss, match="step 0.*row-5\\.") as caught:
        trainer.run()
    assert caught.value.ids == ["row-5"]


def test_order_is_a_new_permutation_each_epoch():
    order = SampledOrder([5], [1.0], seed=0)
    epochs = [[next(order) for _ in range(5)] for _ in range(3)]
    assert all(sorted(ref.row for ref in epoch) == list(range(5)) for epoch in epochs)
    assert [epoch[0].epoch for epoch in epochs] == [0, 1, 2]
    assert len({tuple(ref.row for ref in epoch) for epoch in epochs}) > 1


def test_schedule():
    assert learning_rate_factor("linear", 0, 0, 0.0) == 1
    assert learning_rate_factor("linear", 3, 0, 0.0) == 0.25
    assert learning_rate_factor("linear", 0, 9, 0.75) == 0.25
    assert learning_rate_factor("cosine", 0, 5, 0.5) == pytest.approx(0.5)
    assert learning_rate_factor("constant", 0, 5, 0.9) == 1


def test_muon_orthogonalises():
    p = torch.nn.Parameter(torch.zeros(8, 16))
    p.grad = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    Muon([p], lr=1.0).step()
    values = torch.linalg.svdvals(p.detach())
    assert 0.5 < values.min() and values.max() < 1.5
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=1.0)


BASE = {"model": "m", "output_dir": "o", "data": {"path": "d"}, "steps": 10, "batch_size": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimiser": {}}, "optimiser: unknown key.*known here: .*optimizer"),
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate: unknown key.*known here: name, kernel"),
        ({"steps": 0}, "steps: .*greater than 0.*given: 0"),
        ({"objective": {"text_dropout": 1.5}}, "objective.text_dropout: .*less than or equal to 1"),
        ({"micro_batch_size": 3}, "batch_size=4 must be a multiple of micro_batch_size=3"),
        ({"optimizer": {"muon_lr": 0.1}}, "`muon_lr` belongs to `name: muon`"),
        ({"optimizer": {"warmup_steps": 10}}, "warmup_steps=10 must be below steps=10"),
    ],
)
def test_recipe_errors_are_clear(tmp_path, change, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASE | change))
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_recipe_that_is_missing_or_not_a_mapping(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="not a mapping"):
        load_recipe(tmp_path / "list.yaml")
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml cannot be read" in capsys.readouterr().err


def test_losses_without_labels_count_nothing():
    none = torch.zeros(0, dtype=torch.long)
    terms = {"mse": LossTerm(torch.ones(2, 3), None, none), "ce": LossTerm(torch.zeros(0), None, none)}
    loss, shares = weighted_loss(terms, {"mse": 1.0, "ce": 0.5}, {"mse": 6.0, "ce": 0.0})
    assert shares.tolist() == [1, 0] and loss == 1


def test_rows_helper_has_the_features(rows):
    assert set(rows.features) == set(row(0))


def test_changes_by_dotted_name(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASE))
    changed = load_recipe(file, {"optimizer.lr": 1e-3, "steps": 7, "objective.text_dropout": 0.2})
    assert (changed.optimizer.lr, changed.steps, changed.objective.text_dropout) == (1e-3, 7, 0.2)
    with pytest.raises(RecipeError, match="optimizer.rate: unknown key"):
        load_recipe(file, {"optimizer.rate": 1})


@pytest.mark.parametrize("file", sorted(bundled_recipe("x").parent.glob("*.yaml")), ids=lambda f: f.stem)
def test_bundled_recipes_are_valid(file):
    load_recipe(file)


def test_every_parameter_has_a_gradient_without_references(tmp_path, tiny_pipeline, rows):
    """Else processes whose samples have no references would wait for each other's gradients without end."""
    trainer = Trainer(recipe(tmp_path), tiny_pipeline, rows.select([0, 2, 4, 6]))
    (batch,) = trainer.batches.next_step()
    assert batch.sequence.patches is None
    sum(term.values.sum() for term in trainer.model(batch).values()).backward()
    assert [name for name, p in trainer.model.named_parameters() if p.grad is None] == []


LORA = {"tune": {"method": "lora"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": None}, "give either batch_size or packing"),
        ({"packing": {"packs_per_step": 1}}, "give either batch_size or packing"),
        ({"tune": {"rank": 4}}, "tune: set `method: full` or `method: lora`"),
        ({"tune": {"method": "full", "rank": 4}}, "tune.rank: unknown key.*known here: method, parts"),
        (LORA | {"optimizer": {"name": "muon", "muon_lr": 0.1}}, "muon is for full matrices"),
        ({"sharding": "fsdp2", "processes": 1}, "sharding: fsdp2 has no effect with processes: 1"),
        ({"tune": {"method": "lora", "quantize": "nf4"}}, "set mixed_precision: bf16"),
        ({"data": {"path": "d", "shuffle_buffer": 9}}, "data.shuffle_buffer has no effect without streaming"),
        ({"data": {"path": "d", "weight": 2}}, "data.weight has no effect on a single dataset"),
        ({"data": [{"path": "d"}, {"path": "e", "wieght": 2}]}, "wieght: unknown key.*known here: path"),
        ({"images": {"every": 1, "prompts": []}}, "images: give `prompts`"),
        ({"images": {"every": 1, "prompts": ["a", " "]}}, "images: `prompts` has an empty text"),
        ({"images": {"every": 1, "prompts": "a fox"}}, "images.prompts: Input should be a list"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: Input should be a finite number"),
        (
            {"tune": {"method": "full", "parts": ["text"]}, "optimizer": {"name": "muon", "muon_lr": 0.1}},
            "muon is for the layers' matrices: `text` has none",
        ),
        ({"objective": {"mse_weight": 0, "ce_weight": 0}}, "nothing would be trained"),
        (
            {"batch_size": None, "packing": {"packs_per_step": 3}, "processes": 2},
            "packs_per_step=3 must be a multiple of processes=2",
        ),
    ],
)
def test_impossible_and_idle_settings(tmp_path, change, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in (BASE | change).items() if v is not None}))
    with pytest.raises(RecipeError, match=message):
        load_recipe(file)


def test_a_resolved_recipe_loads_as_itself(tmp_path):
    for name in bundled_names():
        recipe = load_recipe(name)
        (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
        assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_settings_from_the_command_line(tmp_path):
    changes = parse_changes(["optimizer.lr=1e-5", "data.0.path=x", "mixed_precision=no", "ema.decay=0.5"])
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASE | {"data": [{"path": "d"}, {"path": "e"}]}))
    recipe = load_recipe(file, changes)
    assert recipe.optimizer.lr == 1e-5 and recipe.data[0].path == "x" and recipe.mixed_precision == "no"
    assert recipe.ema.decay == 0.5
    for wrong in ("optimizer.lr", "=3", "model.lr=1", "data.7.path=x"):
        with pytest.raises(RecipeError, match=f"--set {wrong.split('=')[0]}"):
            load_recipe(file, parse_changes([wrong]))


def test_several_datasets_are_sampled_by_weight():
    order = SampledOrder([10, 1000], [3.0, 1.0], seed=0)
    drawn = [next(order) for _ in range(4000)]
    assert sum(ref.source == 0 for ref in drawn) / 4000 == pytest.approx(0.75, abs=0.03)
    small = [ref for ref in drawn if ref.source == 0]
    assert sorted(ref.row for ref in small[:10]) == list(range(10)), "an epoch sees each row once"
    lanes = [SampledOrder([10, 1000], [3.0, 1.0], 0, start, 3) for start in range(3)]
    dealt = [[next(lane) for _ in range(100)] for lane in lanes]
    assert [dealt[i % 3][i // 3] for i in range(300)] == drawn[:300]


def test_best_fit_fills_packs_and_lets_nobody_wait():
    assert best_fit([5, 3, 9], 9, first=True) == 0
    assert best_fit([5, 3, 9, 4, 4], 4, first=False) == 3
    assert best_fit([5], 4, first=False) is None
    lengths = torch.randint(200, 3000, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    buffer, fills, waiting = list(enumerate(lengths[:32])), [], 32
    for _ in range(200):
        room, taken = 10_240, []
        while (place := best_fit([n for _, n in buffer], room, first=not taken)) is not None:
            taken.append(buffer.pop(place))
            room -= taken[-1][1]
        fills.append(1 - room / 10_240)
        while len(buffer) < 32:
            buffer.append((waiting, lengths[waiting]))
            waiting += 1
    assert sum(fills) / len(fills) > 0.98


def test_samples_that_are_too_long_are_reported(tmp_path, tiny_pipeline, rows, capsys):
    packing = {"tokens": 40, "packs_per_step": 1, "buffer": 4}
    # However often conditions are dropped: what is too long is so in every epoch.
    objective = {"vae_dropout": 0.9, "vit_dropout": 0.9}
    changes = {"batch_size": None, "packing": packing, "optimizer": {}, "steps": 3, "objective": objective}
    result = Trainer(recipe(tmp_path, **changes), tiny_pipeline, rows).run()
    reported = [json.loads(line) for line in (tmp_path / "run" / "too_long_0.jsonl").read_text().splitlines()]
    assert all(entry["tokens"] > 40 for entry in reported)
    assert 0 < result.log[-1]["too_long"] <= len(reported), "one step more was read ahead"
    assert f"{reported[0]['id']} has {reported[0]['tokens']} tokens" in capsys.readouterr().out
    assert 0 < result.log[-1]["packing_efficiency"] <= 1


def test_flops_are_those_of_the_matrix_products(tiny_pipeline, rows):
    """Counted by torch in a forward and backward pass of everything."""
    from torch.utils.flop_counter import FlopCounterMode

    backbone = make_backbone(tiny_pipeline)
    batch = collate([backbone.sample(row, 0) for row in backbone.prepare(list(rows))], 16, 16)
    model = TrainedModel(backbone).train()
    with FlopCounterMode(display=False) as counter:
        model(batch)["mse"].values.mean().backward()
    assert backbone.flops(batch) == pytest.approx(counter.get_total_flops(), rel=0.15)
