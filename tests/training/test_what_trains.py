"""Parameter groups, AdamW's kernels, adapters to start from, original names, uploads while training."""

import json

import pytest
import torch
from safetensors.torch import load_file

from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.testing.hub import LoopbackHub
from echo4o.training.recipe_files import load_recipe
from echo4o.training.train import Trainer

from .conftest import make_rows
from .running import losses_of, run, train_here, weights_of

LORA = {"method": "lora", "rank": 4, "alpha": 8}


def test_a_group_of_its_own_rate_and_decay(recipe_file, tmp_path):
    groups = {"gen": 1e-2, "und": {"lr": 1e-9, "weight_decay": 0.5}}
    trainer = Trainer(
        load_recipe(recipe_file(optimizer={"lr": 1e-3, "groups": groups})), dataset=make_rows(questions=2)
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in trainer.model.named_parameters()}
    assert moved["transformer.layers.0.gen.ff.up_proj.weight"] > 1e-2
    assert moved["transformer.layers.0.und.ff.up_proj.weight"] < 1e-6
    assert 1e-4 < moved["transformer.lm_head.weight"] < 1e-2
    decays = {group["weight_decay"] for group in trainer.optimizers[0].param_groups}
    assert decays == {0.0, 0.5}


@pytest.mark.long
def test_groups_resume_and_are_the_same_run_where_their_rates_are_equal(recipe_file, tmp_path):
    optimizer = {"lr": 1e-3, "schedule": "constant"}
    assert train_here(recipe_file("plain", optimizer=optimizer)) == 0
    changes = {"optimizer": optimizer | {"groups": {"gen": 1e-3}}, "checkpoints": {"every": 2}}
    file = recipe_file("groups", **changes)
    assert train_here(file, "--set", "steps=2") == 0 and train_here(file, "--resume") == 0
    assert losses_of(tmp_path / "groups") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-6)


@pytest.mark.long
def test_the_kernels_of_adamw_give_the_same_steps(recipe_file, tmp_path):
    for kernel in ("fused", "foreach", "plain"):
        optimizer = {"lr": 1e-3, "kernel": kernel, "weight_decay": 0.1}
        assert train_here(recipe_file(kernel, optimizer=optimizer)) == 0
    for kernel in ("foreach", "plain"):
        assert losses_of(tmp_path / kernel) == pytest.approx(losses_of(tmp_path / "fused"), rel=1e-5)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"optimizer": {"groups": {"gen": 0}}}, "optimizer.groups.gen.lr: Input should be greater than 0"),
        ({"optimizer": {"groups": {"head": 1e-3}}}, "optimizer.groups: head does not train; what trains: text, gen"),
        ({"optimizer": {"name": "muon", "muon_lr": 1e-2, "groups": {"gen": 1e-3}}}, "`groups` are for adamw"),
        ({"optimizer": {"name": "adamw8bit"}}, "adamw8bit needs bitsandbytes: pip install bitsandbytes"),
        ({"tune": {"method": "lokr"}}, "tune.method: lokr is not available: diffusers loads LoKr files, but merges"),
        ({"tune": {"method": "loha"}}, "tune.method: loha is not available: diffusers has no loader"),
        ({"tune": LORA | {"init_adapter": "nowhere"}}, "tune.init_adapter: There is no adapter 'nowhere'"),
        ({"tune": LORA | {"rank_pattern": {"q_proj": 2}}}, "tune.rank_pattern: 'q_proj' matches no adapted module"),
        ({"tune": LORA | {"rank_pattern": {"to_q": 999}}}, "tune.rank=999 exceeds the matrices"),
        ({"hub": {"repo": "no-owner", "every": 2}, "checkpoints": {"every": 2}}, "hub"),
        ({"hub": {"repo": "ns/run", "every": 3}, "checkpoints": {"every": 2}}, "hub.every must be a multiple of"),
    ],
)
def test_settings_that_cannot_train(recipe_file, capsys, changes, told):
    if "adamw8bit" in told:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("bitsandbytes is installed")
    assert train_here(recipe_file(**changes)) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error, error


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_starts_from_an_adapter_and_refuses_another_shape(recipe_file, tmp_path, capsys):
    assert train_here(recipe_file("first", tune=LORA, optimizer={"lr": 1e-2})) == 0
    tune = LORA | {"init_adapter": str(tmp_path / "first" / "adapter")}
    assert train_here(recipe_file("second", tune=tune, optimizer={"lr": 1e-9}, steps=1)) == 0
    first, second = (weights_of(tmp_path / name / "adapter") for name in ("first", "second"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-6, rtol=0)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in second.items() if "lora_B" in name)
    for change, told in (
        ({"rank": 8}, "has other modules or ranks"),
        ({"alpha": 9}, "and the recipe {'lora_alpha': 9"),
    ):
        assert train_here(recipe_file("other", tune=tune | change)) == 2
        assert told in capsys.readouterr().err


@pytest.mark.long
def test_patterns_of_ranks_and_original_names_load_and_generate_the_same(recipe_file, tmp_path, model_folder):
    """The adapter of a run, with the names of the original checkpoint, read back by the pipeline."""
    tune = LORA | {
        "rank_pattern": {r"layers\.0\..*": 2},
        "alpha_pattern": {r".*to_q": 16},
        "experts": ["gen", "und"],
    }
    changes = {"tune": tune, "optimizer": {"lr": 3e-2}, "checkpoints": {"every": 4}}
    assert train_here(recipe_file(**changes)) == 0
    run("export", tmp_path / "run", "--to", "original", "--out", tmp_path / "original")
    stored = load_file(tmp_path / "original" / "adapter_model.safetensors")
    name = "base_model.model.language_model.model.layers.0.self_attn.q_proj_moe_gen.lora_A.weight"
    assert (
        name in stored and stored[name].shape[0] == 2 and len(stored) == len(weights_of(tmp_path / "run" / "adapter"))
    )
    settings = json.loads((tmp_path / "original" / "adapter_config.json").read_text())
    assert settings["alpha_pattern"]["language_model.model.layers.1.self_attn.q_proj"] == 16
    images = []
    for adapter in (None, tmp_path / "run" / "adapter", tmp_path / "original"):
        pipe = Echo4oPipeline.from_pretrained(model_folder, dtype=torch.float32)
        if adapter:
            pipe.load_lora_weights(adapter)
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "output_type": "latent", "generator": generator}
        images.append(pipe("a red square", **options).images[0])
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_exports_are_pushed_while_training_and_a_fault_stops_nothing(recipe_file, tmp_path):
    changes = {"tune": LORA, "checkpoints": {"every": 2}, "hub": {"repo": "ns/run", "every": 2}, "steps": 4}
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"}
        told = run("train", recipe_file(**changes), **environment)
        assert "hub: step 4 is at ns/run" in told, told
        repo = hub.repo("ns/run")
        assert "pytorch_lora_weights.safetensors" in repo.files
    told = run("train", recipe_file("offline", **changes), **environment)  # the Hub is gone
    assert "could not be pushed" in told and (tmp_path / "offline" / "adapter").is_dir()
