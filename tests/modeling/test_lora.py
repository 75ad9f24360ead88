"""Adapters on the pipeline: what is saved draws the same after loading, whoever saved it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from echo4o import Echo4oPipeline
from echo4o.modeling.bagel.lora_bagel import LORA_TARGETS
from tests.modeling.conftest import GOLDEN

KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.fixture
def fresh():
    def make():
        pipe = Echo4oPipeline.from_original(
            GOLDEN / "checkpoint",
            vae_image_limits={"max_size": 64, "min_size": 32},
            vision_image_limits={"max_size": 56, "min_size": 28},
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def draw(pipe):
    generator = torch.Generator().manual_seed(0)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe("a dot", generator=generator, **options).images


def config(kind, expert="gen"):
    return LoraConfig(r=4, lora_alpha=13, target_modules=LORA_TARGETS[expert], init_lora_weights=False, **KINDS[kind])


def save(pipe, folder):
    Echo4oPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_loads_fuses_and_leaves(fresh, tmp_path, kind):
    trained = fresh()
    base = draw(trained)
    trained.transformer.add_adapter(config(kind))
    wanted = draw(trained)
    save(trained, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    pipe = fresh()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), wanted) and (wanted - base).abs().max() > 0.1
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), wanted, atol=1e-4, rtol=0)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), base, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_itself_load(fresh, tmp_path, kind):
    trained = fresh()
    model = get_peft_model(trained.transformer, config(kind, "both"))
    wanted = draw(trained)
    model.save_pretrained(tmp_path)
    pipe = fresh()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), wanted)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="without adapter_config.json"):
        fresh().load_lora_weights(tmp_path)


def test_several_adapters_with_weights(fresh, tmp_path):
    base = draw(fresh())
    for index, expert in enumerate(("gen", "und")):
        torch.manual_seed(index)
        trained = fresh()
        trained.transformer.add_adapter(config("plain", expert))
        save(trained, tmp_path / expert)
    pipe = fresh()
    for expert in ("gen", "und"):
        pipe.load_lora_weights(tmp_path / expert, adapter_name=expert)
    pipe.set_adapters(["gen", "und"], [1.0, 0.0])
    alone = fresh()
    alone.load_lora_weights(tmp_path / "gen")
    torch.testing.assert_close(draw(pipe), draw(alone), atol=1e-5, rtol=0)
    pipe.set_adapters(["gen", "und"], [0.0, 0.0])
    torch.testing.assert_close(draw(pipe), base, atol=1e-5, rtol=0)


def test_pickled_adapters_are_refused(fresh, tmp_path):
    torch.save({}, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises((ValueError, OSError)):
        fresh().load_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="pickled"):
        fresh().load_lora_weights(tmp_path, use_safetensors=False)


@pytest.mark.parametrize("expert, count", [("gen", 7), ("und", 7), ("both", 14)])
def test_presets_name_every_matrix_of_an_expert(fresh, expert, count):
    pipe = fresh()
    pipe.transformer.add_adapter(config("plain", expert))
    adapted = [name for name, module in pipe.transformer.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == count * pipe.transformer.config.num_layers
