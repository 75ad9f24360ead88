"""The trainer on a tiny random model: it learns, stops on bad numbers, and what it saves loads."""

import copy
import json

import pytest
import torch
import yaml

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.training.data import Order
from echo4o.training.objective import LossTerms
from echo4o.training.optimizers import Muon
from echo4o.training.packing import FixedBatches
from echo4o.training.recipe import Recipe, RecipeError, load_recipe, shipped_recipe
from echo4o.training.train import NonFiniteLoss, Trainer, learning_rate_factor, main

from .conftest import row


def recipe(tmp_path, **changes) -> Recipe:
    values = {
        "model": "unused",
        "output_dir": tmp_path / "run",
        "data": {"path": "unused"},
        "optimizer": {"name": "muon", "lr": 3e-3, "muon_lr": 1e-2},
        "steps": 20,
        "batch_size": 8,
        "device": "cpu",
    }
    return Recipe.model_validate(values | changes)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_twenty_steps_lower_the_loss(tmp_path, tiny_pipeline, rows, name):
    optimizer = {"name": name, "lr": 3e-3} | ({"muon_lr": 1e-2} if name == "muon" else {})
    result = Trainer(recipe(tmp_path, optimizer=optimizer), tiny_pipeline, rows).run()
    losses = [entry["mse"] for entry in result.log]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    lines = (tmp_path / "run" / "train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(20))


def test_saved_folder_draws(tmp_path, tiny_pipeline, rows):
    result = Trainer(recipe(tmp_path, steps=2), tiny_pipeline, rows).run()
    loaded = Echo4oPipeline.from_pretrained(result.pipeline_dir)
    assert loaded.transformer.dtype == torch.bfloat16
    assert loaded("a red square", num_inference_steps=2).images[0].size == (64, 64)


def test_accumulation_and_processes_see_the_same_samples(tmp_path, tiny_pipeline, rows):
    """Losses of a step do not depend on how its samples are split."""
    whole = Trainer(recipe(tmp_path, steps=3), tiny_pipeline, rows)
    ranks = [FixedBatches(whole.batches.rows, recipe(tmp_path), whole.batches.sides, rank, 2) for rank in range(2)]
    dealt = sorted(i for source in ranks for batch in source.next_step() for i in batch.ids)
    assert dealt == sorted(i for batch in whole.batches.next_step() for i in batch.ids)


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
    maker = trainer.batches.rows.maker
    prepare = maker.prepare

    def spoiled(new):
        made = prepare(new)
        for prepared in made:
            if prepared.id == "row-5":
                prepared.moments.fill_(float("inf"))
        return made

    maker.prepare = spoiled
    with pytest.raises(NonFiniteLoss, match="step 0.*row-5\\.") as caught:
        trainer.run()
    assert caught.value.ids == ["row-5"]


def test_order_is_a_new_permutation_each_epoch():
    order = Order([5], [1.0], seed=0)
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
        ({"optimizer": {"learning_rate": 1}}, "optimizer.learning_rate: unknown key.*known here: name, lr"),
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


def test_recipe_that_is_no_mapping_or_missing(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match="no mapping"):
        load_recipe(tmp_path / "list.yaml")
    assert main([str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml cannot be read" in capsys.readouterr().err


def test_losses_without_labels_count_nothing():
    terms = LossTerms(torch.ones(2, 3), torch.zeros(0), torch.zeros(0))
    assert terms.sums().tolist() == [6, 6, 0, 0]


def test_rows_helper_has_the_features(rows):
    assert set(rows.features) == set(row(0))


def test_changes_by_dotted_name(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(BASE))
    changed = load_recipe(file, {"optimizer.lr": 1e-3, "steps": 7, "objective.text_dropout": 0.2})
    assert (changed.optimizer.lr, changed.steps, changed.objective.text_dropout) == (1e-3, 7, 0.2)
    with pytest.raises(RecipeError, match="optimizer.rate: unknown key"):
        load_recipe(file, {"optimizer.rate": 1})


@pytest.mark.parametrize("file", sorted(shipped_recipe("x").parent.glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_recipes_are_valid(file):
    load_recipe(file)


def test_every_parameter_has_a_gradient_without_references(tmp_path, tiny_pipeline, rows):
    """Else processes whose samples have no references would wait for each other's gradients without end."""
    trainer = Trainer(recipe(tmp_path), tiny_pipeline, rows.select([0, 2, 4, 6]))
    (batch,) = trainer.batches.next_step()
    assert batch.sequence.patches is None
    trainer.model(batch, 1.0).sums()[[0, 2]].sum().backward()
    assert [name for name, p in trainer.model.named_parameters() if p.grad is None] == []
