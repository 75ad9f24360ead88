"""A run is the same run however it is spread, sharded, packed or accumulated. By the real command line."""

import json

import pytest
import torch

from echo4o.training.backbones.bagel import collate
from echo4o.training.data import PreparedRows
from echo4o.training.model import TrainedModel
from echo4o.training.packing import PackedBatches
from echo4o.training.recipe_files import load_recipe

from .conftest import make_backbone
from .running import log_of, losses_of, run, torchrun, train_here, weights_of

SHARED = {"batch_size": 4, "steps": 4, "ema": {"decay": 0.9}}


def check_norms(run, expected) -> None:
    """Of the gradients: clipping and Adam hide a factor from the weights."""
    norms = [[entry["grad_norm"] for entry in log_of(folder)] for folder in (run, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def close(a: dict, b: dict, atol: float) -> None:
    assert a.keys() == b.keys()
    # A key's bias adds the same to all of a softmax: its gradient is rounding alone, which Adam scales to full steps.
    for name in (name for name in a if not name.endswith("k_proj.bias")):
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=name)


@pytest.mark.long
def test_one_process_two_processes_accumulation_and_sharding(recipe_file, tmp_path, model_folder, rows_folder):
    """Batch 4 = micro-batches of one sample = two processes (DDP) = two processes with sharded weights (FSDP2)."""
    file = recipe_file("whole", **SHARED)
    assert train_here(file) == 0
    whole, weights = losses_of(tmp_path / "whole"), weights_of(tmp_path / "whole" / "pipeline")
    assert any(entry["ce"] > 0 for entry in log_of(tmp_path / "whole")), "some step has a text loss"

    assert train_here(file, "--set", "micro_batch_size=1", "--set", f"output_dir={tmp_path / 'single'}") == 0
    assert losses_of(tmp_path / "single") == pytest.approx(whole, abs=1e-5)
    close(weights_of(tmp_path / "single" / "pipeline"), weights, 1e-5)
    check_norms(tmp_path / "single", tmp_path / "whole")

    said = run("train", file, "--set", "processes=2", "--set", f"output_dir={tmp_path / 'ddp'}")
    assert "(2 processes, multi_cpu)" in said
    assert losses_of(tmp_path / "ddp") == pytest.approx(whole, abs=1e-5)
    close(weights_of(tmp_path / "ddp" / "pipeline"), weights, 1e-5)
    check_norms(tmp_path / "ddp", tmp_path / "whole")

    changes = {"model": model_folder, "data.path": rows_folder, "output_dir": tmp_path / "fsdp", "processes": 2}
    changes |= {"steps": 4, "packing": "null", "batch_size": 4, "device": "cpu", "mixed_precision": "no"}
    changes |= {"optimizer": json.dumps({"lr": 1e-3, "warmup_steps": 1, "schedule": "linear"}), "ema.decay": 0.9}
    changes |= {"objective": "{}", "tune.parts": "[gen, und, text, vision]", "save_dtype": "float32"}
    changes |= {"checkpoints.every": 2}
    options = [part for name, value in changes.items() for part in ("--set", f"{name}={value}")]
    torchrun(2, "tests.training.force_fsdp2", "full_fsdp2_8gpu", *options)
    for rank in range(2):
        facts = json.loads((tmp_path / "fsdp" / f"sharded-{rank}.json").read_text())
        assert facts["sharded"] == facts["parameters"] > 100, "every parameter is a DTensor"
        assert facts["share"] == pytest.approx(0.5, abs=0.02), "and each process holds half"
    assert losses_of(tmp_path / "fsdp") == pytest.approx(losses_of(tmp_path / "ddp"), abs=1e-5)
    close(weights_of(tmp_path / "fsdp" / "pipeline"), weights, 1e-5)
    check_norms(tmp_path / "fsdp", tmp_path / "whole")

    # What two sharded processes saved, one process takes up.
    resumed = [*options, "--set", "processes=null", "--set", "sharding=none", "--set", "steps=6", "--resume"]
    assert train_here("full_fsdp2_8gpu", *resumed) == 2, "sharding decides rounding: not the same run"


def test_a_packed_batch_equals_its_samples_one_by_one(tiny_pipeline, rows):
    backbone = make_backbone(tiny_pipeline, seed=3, time_shift=4.0, text_dropout=0.1, vit_dropout=0.3, vae_dropout=0.3)
    model = TrainedModel(backbone).train()
    samples = [backbone.sample(row, 0) for row in backbone.prepare(list(rows))]

    def gradients(batches):
        model.zero_grad()
        errors = torch.cat([model(collate(batch, 16, 16))["mse"].values for batch in batches])
        errors.mean().backward()
        return errors.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    together, expected = gradients([samples])
    alone, given = gradients([[sample] for sample in samples])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(given[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("streaming", [False, True])
def test_packs_do_not_depend_on_the_number_of_processes(recipe_file, tiny_pipeline, rows, streaming):
    data = {"path": "unused", "streaming": streaming}
    file = recipe_file(batch_size=None, packing={"tokens": 100, "packs_per_step": 2, "buffer": 4}, data=data)
    recipe = load_recipe(file)
    backbone = make_backbone(tiny_pipeline, text_dropout=0.1, vit_dropout=0.3, vae_dropout=0.3)

    def source(rank=0, processes=1):
        dataset = rows.to_iterable_dataset(num_shards=2) if streaming else rows
        prepared = PreparedRows([dataset], [1.0], backbone, 0, 10**9)
        return PackedBatches(prepared, recipe.packing, backbone.collate, rank, processes)

    one, first, second = source(), source(0, 2), source(1, 2)
    for _ in range(6):
        together = [batch.ids for batch in one.next_step()]
        assert together == [batch.ids for half in (first, second) for batch in half.next_step()]
    # Going on from a saved position gives the same packs, for any number of processes.
    again = source(1, 2)
    again.load_state(one.state())
    assert [b.ids for b in again.next_step()] == [b.ids for b in one.next_step()[1:]]


@pytest.mark.long
def test_two_processes_fill_the_packs_of_one(recipe_file, tmp_path):
    file = recipe_file("packed", batch_size=None, packing={"tokens": 100, "packs_per_step": 2, "buffer": 6})
    assert train_here(file) == 0
    run("train", file, "--set", "processes=2", "--set", f"output_dir={tmp_path / 'two'}")
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "packed"), abs=1e-5)


@pytest.mark.long
def test_refuses_fewer_processes_than_asked(recipe_file, capsys):
    file = recipe_file(processes=2)
    assert train_here(file) == 2
    assert "processes: 2 was asked for, but 1 runs" in capsys.readouterr().err
    said = run(
        "--cpu", "--num_processes", 2, "-m", "echo4o.training.train", file, module="accelerate.commands.launch", code=1
    )
    assert "processes: 2 was asked for, but 1 runs" in said


def test_refuses_sharding_that_would_not_happen(recipe_file, capsys):
    assert train_here(recipe_file(sharding="fsdp2")) == 2
    assert "sharding: fsdp2 was asked for, but Accelerate would run" in capsys.readouterr().err
