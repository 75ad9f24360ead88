"""Adapters of the pipeline: saving, loading, several adapters, and the scale of a call."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from tests.modeling.lora_adapters import KINDS, config, draw, scalings

# --- the state of injected layers ------------------------------------------------------------------------------------


def load_by_pipeline(pipe, folder):
    pipe.load_lora_weights(folder)


def load_by_model(pipe, folder):
    pipe.transformer.load_lora_adapter(str(folder), prefix="transformer", use_safetensors=True)


def load_by_hotswap(pipe, folder):
    pipe.load_lora_weights(folder, adapter_name="a")
    pipe.load_lora_weights(folder, adapter_name="a", hotswap=True)


def load_second(pipe, folder):
    pipe.load_lora_weights(folder, adapter_name="a")
    pipe.load_lora_weights(folder, adapter_name="b")
    pipe.set_adapters(["a", "b"])


@pytest.mark.parametrize("load", [load_by_pipeline, load_by_model, load_by_hotswap, load_second])
def test_dropout_of_an_adapter_is_off_in_generation_and_nothing_stays_after_unloading(fresh, adapters, load):
    pipe = fresh()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    base = draw(pipe)
    load(pipe, adapters(lora_dropout=0.5))
    assert not any(module.training for module in pipe.transformer.modules())
    assert torch.equal(draw(pipe), draw(pipe)) and not torch.equal(draw(pipe), base)
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(draw(pipe), base)


def test_an_adapter_added_to_a_model_in_training_trains_with_dropout(fresh):
    transformer = fresh().transformer.train()
    transformer.add_adapter(config(lora_dropout=0.5))
    assert all(module.training for module in transformer.modules())


@pytest.mark.parametrize("initialization", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_changed_the_base_weights_is_refused(fresh, tmp_path, initialization):
    """Its tensors belong to other base weights; PEFT converts such an adapter into an ordinary one."""
    pipe = fresh()
    settings = LoraConfig(
        r=4,
        lora_alpha=4,
        target_modules=BagelTransformer2DModel._lora_targets["gen"],
        init_lora_weights=initialization,
    )
    model = get_peft_model(pipe.transformer, settings)
    model.save_pretrained(tmp_path / "own")
    other = fresh()
    before = draw(other)
    with pytest.raises(ValueError, match=f"initialized by '{initialization}', which changes the base weights"):
        other.load_lora_weights(tmp_path / "own")
    assert torch.equal(draw(other), before)


@pytest.mark.parametrize("initialization", ["pissa", "pissa_niter_2", "olora", "corda", "loftq", "PiSSA"])
def test_an_initialization_that_would_change_the_base_weights_is_refused(fresh, initialization):
    from echo4o.modeling.blip3o.transformer_blip3o import Blip3oTransformer2DModel
    from echo4o.modeling.omnigen2.transformer_omnigen2 import OmniGen2Transformer2DModel

    model = fresh().transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = config()
    settings.init_lora_weights = initialization
    for owner in (model, Blip3oTransformer2DModel, OmniGen2Transformer2DModel):
        add = owner.add_adapter if owner is model else lambda given, cls=owner: cls.add_adapter(None, given)
        with pytest.raises(ValueError, match=f"init_lora_weights='{initialization}' changes the base weights"):
            add(settings)
    assert not getattr(model, "peft_config", None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("initialization", ["gaussian", "orthogonal"])
def test_other_initializations_load_exactly(fresh, tmp_path, initialization):
    pipe = fresh()
    model = get_peft_model(
        pipe.transformer,
        LoraConfig(
            r=4,
            lora_alpha=4,
            target_modules=BagelTransformer2DModel._lora_targets["gen"],
            init_lora_weights=initialization,
        ),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    wanted = draw(pipe)
    other = fresh()
    before = {name: tensor.clone() for name, tensor in other.transformer.state_dict().items()}
    other.load_lora_weights(tmp_path)
    assert torch.equal(draw(other), wanted)
    other.unload_lora_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.transformer.state_dict().items())


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapter_loads_fuses_and_leaves(fresh, tmp_path, kind):
    trained = fresh()
    base = draw(trained)
    trained.transformer.add_adapter(config(kind))
    wanted = draw(trained)
    file = trained.save_lora_adapter(tmp_path)
    assert file == tmp_path / "pytorch_lora_weights.safetensors" and list(tmp_path.iterdir()) == [file]

    pipe = fresh()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), wanted) and (wanted - base).abs().max() > 0.1
    pipe.save_lora_adapter(tmp_path / "again")
    with safe_open(file, "pt") as first, safe_open(tmp_path / "again" / file.name, "pt") as second:
        assert list(first.keys()) == list(second.keys())
        assert all(torch.equal(first.get_tensor(n), second.get_tensor(n)) for n in first.keys())
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)
    assert not getattr(pipe.transformer, "peft_config", None) and not scalings(pipe)

    pipe.load_lora_weights(file)
    if kind == "bias":
        with pytest.raises(ValueError, match="lora_bias=True cannot be fused"):
            pipe.fuse_lora()
        return
    pipe.fuse_lora()
    torch.testing.assert_close(draw(pipe), wanted, atol=2e-5, rtol=0)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), wanted, atol=2e-5, rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_peft_itself_load(fresh, tmp_path, kind):
    trained = fresh()
    model = get_peft_model(trained.transformer, config(kind, "both"))
    wanted = draw(trained)
    model.save_pretrained(tmp_path)
    pipe = fresh()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(draw(pipe), wanted)
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 13


def test_weights_at_hand_load_with_a_configuration(fresh, adapters):
    folder = adapters()
    wanted = fresh()
    wanted.load_lora_weights(folder)
    state = wanted.lora_state_dict(folder)
    for given in (config(), config().to_dict()):
        pipe = fresh()
        pipe.load_lora_weights(state, config=given)
        assert torch.equal(draw(pipe), draw(wanted))


@pytest.mark.parametrize("expert, count", [("gen", 7), ("und", 7), ("both", 14)])
def test_presets_name_every_matrix_of_an_expert(fresh, expert, count):
    pipe = fresh()
    assert pipe.lora_targets == BagelTransformer2DModel._lora_targets
    pipe.transformer.add_adapter(config(expert=expert))
    adapted = [name for name, module in pipe.transformer.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == count * pipe.transformer.config.num_layers


# --- several adapters ------------------------------------------------------------------------------------------------


def test_several_adapters_with_weights(fresh, adapters):
    pipe = fresh()
    base = draw(pipe)
    for expert in ("gen", "und"):
        pipe.load_lora_weights(adapters(expert), adapter_name=expert)
        assert pipe.get_active_adapters() == [expert]
    alone = fresh()
    alone.load_lora_weights(adapters("gen"))
    pipe.set_adapters(["gen", "und"], [1.0, 0.0])
    torch.testing.assert_close(draw(pipe), draw(alone), atol=1e-5, rtol=0)
    pipe.set_adapters(["gen", "und"], [0.0, 0.0])
    torch.testing.assert_close(draw(pipe), base, atol=1e-5, rtol=0)
    pipe.set_adapters("gen")
    assert torch.equal(draw(pipe), draw(alone))


def test_names_are_given_without_collisions(fresh, adapters):
    pipe = fresh()
    for expert in ("gen", "und", "gen"):
        pipe.load_lora_weights(adapters(expert))
    assert pipe.get_list_adapters() == {"transformer": ["default_0", "default_1", "default_2"]}


@pytest.mark.long
def test_disabling_and_deleting_switch_nothing_else_on(fresh, adapters):
    pipe = fresh()
    base = draw(pipe)
    for index, (name, expert) in enumerate((("a", "gen"), ("b", "und"), ("c", "both"))):
        pipe.load_lora_weights(adapters(expert, index), adapter_name=name)
    pipe.set_adapters(["a", "c"])
    both = draw(pipe)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), both)
    pipe.delete_adapters("c")
    assert pipe.get_active_adapters() == ["a"]
    alone = fresh()
    alone.load_lora_weights(adapters("gen", 0))
    assert torch.equal(draw(pipe), draw(alone))
    pipe.delete_adapters("a")
    assert pipe.get_active_adapters() == [] and torch.equal(draw(pipe), base)
    pipe.delete_adapters("b")
    assert torch.equal(draw(pipe), base) and pipe.get_list_adapters() == {}


# --- scale -----------------------------------------------------------------------------------------------------------


def test_scale_of_a_call_is_that_of_set_adapters_and_is_gone_afterwards(fresh, adapters):
    pipe = fresh()
    base = draw(pipe)
    for index in range(2):
        pipe.load_lora_weights(adapters("both", index), adapter_name=str(index))
    pipe.set_adapters(["0", "1"], [0.7, 0.3])
    before, wanted = scalings(pipe), draw(pipe)
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 1.0}), wanted)
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 0}), base)
    halved = draw(pipe, attention_kwargs={"scale": 0.5})
    said = pipe.chat("a dot", max_new_tokens=4, attention_kwargs={"scale": 0.0})
    assert scalings(pipe) == before and torch.equal(draw(pipe), wanted)
    pipe.set_adapters(["0", "1"], [0.35, 0.15])
    torch.testing.assert_close(draw(pipe), halved, atol=1e-6, rtol=0)
    assert said == fresh().chat("a dot", max_new_tokens=4)


def test_scale_of_a_call_ends_with_an_error(fresh, adapters):
    pipe = fresh()
    pipe.load_lora_weights(adapters())
    before = scalings(pipe)

    def stop(*args):
        assert scalings(pipe) != before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, attention_kwargs={"scale": 0.3}, callback_on_step_end=stop)
    assert scalings(pipe) == before


@pytest.mark.parametrize(
    "value, message",
    [
        ({"scale": "1"}, "must be a finite number"),
        ({"scale": float("nan")}, "must be a finite number"),
        ({"size": 1}, "must be ..scale.: number"),
        (0.5, "must be ..scale.: number"),
        ({"scale": 0.5}, "No adapter is loaded"),
    ],
)
def test_scales_that_cannot_be_honoured(fresh, value, message):
    with pytest.raises(ValueError, match=message):
        draw(fresh(), attention_kwargs=value)
