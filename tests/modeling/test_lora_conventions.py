# ruff: noqa: F811
"""Adapters as users of diffusers handle them: metadata with a prefix, weights by component, gradients after unloading."""

import pytest
import torch
from peft import LoraConfig

from echo4o import Echo4oPipeline
from tests.modeling.lora_adapters import config, draw


def test_metadata_has_the_prefix_of_the_weights_and_loads_as_in_diffusers(fresh, adapters):
    folder = adapters()
    wanted = fresh()
    wanted.load_lora_weights(folder)
    state, metadata = Echo4oPipeline.lora_state_dict(folder, return_lora_metadata=True)
    assert metadata["transformer.lora_alpha"] == 13 and all(name.startswith("transformer.") for name in metadata)
    pipe = fresh()
    pipe.load_lora_into_transformer(state, pipe.transformer, adapter_name="a", metadata=metadata)
    assert torch.equal(draw(pipe), draw(wanted))
    assert Echo4oPipeline.lora_state_dict(state, return_lora_metadata=True)[1] is None


@pytest.mark.parametrize("load", ["file", "diffusers", "peft"])
def test_parameters_require_gradients_after_unloading_as_before(fresh, adapters, load):
    pipe = fresh()
    pipe.transformer.requires_grad_(False)
    pipe.transformer.proj_in.requires_grad_(True)
    pipe.transformer.layers[0].gen.to_q.requires_grad_(True)
    before = {name: p.requires_grad for name, p in pipe.transformer.named_parameters()}
    for name in ("first", "second"):
        if load == "peft":
            pipe.transformer.add_adapter(config(), adapter_name=name)
        elif load == "file":
            pipe.load_lora_weights(adapters(), adapter_name=name)
        else:
            pipe.transformer.load_lora_adapter(
                pipe.lora_state_dict(adapters()), adapter_name=name, metadata=prefixed(config())
            )
    pipe.unload_lora_weights()
    assert {name: p.requires_grad for name, p in pipe.transformer.named_parameters()} == before


def prefixed(settings: LoraConfig) -> dict:
    return {f"transformer.{name}": value for name, value in settings.to_dict().items()}


def test_weights_of_adapters_by_component(fresh, adapters):
    pipe = fresh()
    for expert in ("gen", "und"):
        pipe.load_lora_weights(adapters(expert), adapter_name=expert)
    pipe.set_adapters(["gen", "und"], [0.5, 2.0])
    wanted = draw(pipe)
    pipe.set_adapters(["gen", "und"], [{"transformer": 0.5}, {"transformer": 2.0}])
    assert torch.equal(draw(pipe), wanted)
    pipe.set_adapters("gen", 0.5)
    wanted = draw(pipe)
    pipe.set_adapters("gen", {"transformer": 0.5})
    assert torch.equal(draw(pipe), wanted)
    for weight in ({"text_encoder": 0.5}, {"transformer": 0.5, "unet": 1.0}, {"transformer": {"layers": 1.0}}):
        with pytest.raises(ValueError, match="transformer|finite"):
            pipe.set_adapters("gen", weight)
