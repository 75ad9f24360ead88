"""Adapters of the pipeline: fusing, replacing, and other features beside them."""

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from peft import LoraConfig

from tests.modeling.lora_adapters import config, draw, scalings

# --- fuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_unfusing_restores_weights_and_scale(fresh, tmp_path, kind, scale):
    trained = fresh()
    trained.transformer.add_adapter(config(kind, "both"))
    trained.save_lora_adapter(tmp_path)
    pipe = fresh()
    weights = {n: p.clone() for n, p in pipe.transformer.named_parameters()}
    pipe.load_lora_weights(tmp_path, adapter_name="x")
    pipe.set_adapters("x", 0.8)
    before, drawn = scalings(pipe), draw(pipe)
    scaled = draw(pipe, attention_kwargs={"scale": scale})
    pipe.fuse_lora(lora_scale=scale)
    assert pipe.num_fused_loras == 1
    torch.testing.assert_close(draw(pipe), scaled, atol=2e-5, rtol=0)
    pipe.unfuse_lora()
    assert scalings(pipe) == before and pipe.num_fused_loras == 0
    torch.testing.assert_close(draw(pipe), drawn, atol=2e-5, rtol=0)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" not in name:
            torch.testing.assert_close(parameter, weights[name.replace(".base_layer", "")], atol=1e-6, rtol=0)


def test_fused_adapters_forbid_what_would_have_no_effect(fresh, adapters):
    pipe = fresh()
    with pytest.raises(ValueError, match="No adapter is loaded"):
        pipe.fuse_lora()
    for index in range(2):
        pipe.load_lora_weights(adapters("gen", index), adapter_name=str(index))
    pipe.set_adapters(["0", "1"])
    with pytest.raises(ValueError, match="1 would have no effect beside fused adapters"):
        pipe.fuse_lora(adapter_names=["0"])
    with pytest.raises(ValueError, match="There is no adapter 'x'; loaded are 0, 1"):
        pipe.fuse_lora(adapter_names=["x"])
    pipe.fuse_lora()
    for act in (
        lambda: pipe.fuse_lora(),
        lambda: pipe.set_adapters("0"),
        lambda: pipe.delete_adapters("0"),
        lambda: pipe.disable_lora(),
        lambda: pipe.load_lora_weights(adapters("und")),
        lambda: draw(pipe, attention_kwargs={"scale": 0.5}),
    ):
        with pytest.raises(ValueError, match="An adapter is fused into the weights"):
            act()
    pipe.unfuse_lora()
    pipe.set_adapters("0")


def test_fusing_that_fails_leaves_everything_as_it_was(fresh, adapters):
    pipe = fresh()
    pipe.load_lora_weights(adapters("gen"), adapter_name="x")
    before, drawn = scalings(pipe), draw(pipe)
    last = pipe.transformer.layers[-1].gen.ff.down_proj.lora_B["x"].weight
    kept = last.detach().clone()
    last.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(lora_scale=0.5, safe_fusing=True)
    last.data.copy_(kept)
    assert scalings(pipe) == before and pipe.num_fused_loras == 0
    torch.testing.assert_close(draw(pipe), drawn, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="nan for lora_scale must be a finite number"):
        pipe.fuse_lora(lora_scale=float("nan"))
    pipe.disable_lora()
    with pytest.raises(ValueError, match="turned off: call enable_lora"):
        pipe.fuse_lora()


@pytest.mark.parametrize(
    "names, weights, message",
    [
        ("x", float("nan"), "nan for adapter_weights must be a finite number"),
        ("x", ["1"], "'1' for adapter_weights must be a finite number"),
        ("x", [1, 2], "must have one weight per adapter: 1"),
        (["x", "x"], [1, 2], "must contain at least one adapter, and each one once"),
        ([], None, "must contain at least one"),
    ],
)
def test_choices_of_adapters_that_mean_nothing(fresh, adapters, names, weights, message):
    pipe = fresh()
    pipe.load_lora_weights(adapters("gen"), adapter_name="x")
    before = scalings(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.set_adapters(names, weights)
    assert scalings(pipe) == before


@pytest.mark.long
def test_adapters_under_the_wrapper_of_torch_compile(fresh, adapters):
    """diffusers' own methods do nothing there, without a word."""
    pipe, plain = fresh(), fresh()
    base = draw(plain)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    for p in (pipe, plain):
        p.load_lora_weights(adapters("gen"), adapter_name="x")
        p.set_adapters("x", 0.5)
    assert pipe.get_active_adapters() == ["x"] and pipe.get_list_adapters() == {"transformer": ["x"]}
    wanted = draw(plain)
    assert torch.equal(draw(pipe), wanted)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    pipe.fuse_lora()
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(pipe), wanted, atol=2e-5, rtol=0)
    pipe.unload_lora_weights()
    torch.testing.assert_close(draw(pipe), base, atol=2e-5, rtol=0)
    assert pipe.get_list_adapters() == {}


def test_step_caches_are_not_cut_off_by_adapters(fresh, adapters):
    def taylorseer(pipe):
        pipe.transformer.enable_cache(
            TaylorSeerCacheConfig(skip_predict_identifiers=[r"layers\.\d+"], cache_identifiers=["proj_out"])
        )

    maker, folder = fresh(), adapters("gen")
    maker.transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_out"], init_lora_weights=False))
    outside = folder.parent / "outside"
    maker.save_lora_adapter(outside)
    pipe = fresh()
    taylorseer(pipe)
    pipe.load_lora_weights(folder)  # inside the layers they come and go
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=r"changes proj_out"):
        pipe.load_lora_weights(outside)
    pipe.transformer.disable_cache()
    pipe.load_lora_weights(outside)
    taylorseer(pipe)
    with pytest.raises(ValueError, match=r"changes proj_out"):
        pipe.unload_lora_weights()


# --- hotswap ---------------------------------------------------------------------------------------------------------


def test_hotswap_equals_loading(fresh, adapters, tmp_path):
    first, second = adapters("gen", 0), adapters("gen", 1, r=2, lora_alpha=5)
    alone = fresh()
    alone.load_lora_weights(second, adapter_name="x")
    pipe = fresh()
    pipe.enable_lora_hotswap(target_rank=6)
    pipe.load_lora_weights(first, adapter_name="x")
    pipe.load_lora_weights(second, adapter_name="x", hotswap=True)
    torch.testing.assert_close(draw(pipe), draw(alone), atol=1e-5, rtol=0)
    for p in (pipe, alone):  # the rank and alpha of the new one, not of the old one
        p.set_adapters("x", 0.5)
    torch.testing.assert_close(draw(pipe), draw(alone), atol=1e-5, rtol=0)
    pipe.save_lora_adapter(tmp_path / "saved")
    again = fresh()
    again.load_lora_weights(tmp_path / "saved", adapter_name="x")
    again.set_adapters("x", 0.5)
    assert torch.equal(draw(again), draw(alone))
    with pytest.raises(ValueError, match="'y' is none of"):
        pipe.load_lora_weights(second, adapter_name="y", hotswap=True)
    with pytest.raises(ValueError, match="unexpected keys|does not|use_dora"):
        pipe.load_lora_weights(adapters("gen", 3, use_dora=True), adapter_name="x", hotswap=True)


@pytest.mark.long
def test_hotswap_after_compiling_does_not_compile_again(fresh, adapters):
    first, second = adapters("gen", 0), adapters("gen", 1, r=2, lora_alpha=5)
    alone = fresh()
    alone.load_lora_weights(second, adapter_name="x")
    pipe = fresh()
    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(first, adapter_name="x")
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="eager")
    draw(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_lora_weights(second, adapter_name="x", hotswap=True)
        torch.testing.assert_close(draw(pipe), draw(alone), atol=1e-5, rtol=0)
        halved = draw(pipe, attention_kwargs={"scale": 0.5})
    alone.set_adapters("x", 0.5)
    torch.testing.assert_close(halved, draw(alone), atol=1e-5, rtol=0)
    torch._dynamo.reset()


# --- beside other features -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False])
def test_adapters_load_before_and_after_group_offload(fresh, adapters, early):
    folder = adapters("both")
    pipe, plain = fresh(), fresh()
    steps = [
        lambda: pipe.load_lora_weights(folder),
        lambda: pipe.enable_group_offload(torch.device("cpu"), num_blocks_per_group=1),
    ]
    for step in steps if early else reversed(steps):
        step()
    plain.load_lora_weights(folder)
    assert torch.equal(draw(pipe), draw(plain))
    pipe.unload_lora_weights()
    plain.unload_lora_weights()
    assert torch.equal(draw(pipe), draw(plain))


def test_adapters_stay_wide_beside_8_bit_weights(fresh, adapters):
    folder = adapters("both")
    pipe, plain = fresh(), fresh()
    pipe.load_lora_weights(folder)
    plain.load_lora_weights(folder)
    plain_drawn, base = draw(plain), draw(fresh())
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert {p.dtype for n, p in pipe.transformer.named_parameters() if "lora_" in n} == {torch.float32}
    assert (draw(pipe) - plain_drawn).abs().max() < 0.2 * (plain_drawn - base).abs().max()
    with pytest.raises(ValueError, match="Load adapters before enable_layerwise_casting"):
        pipe.load_lora_weights(folder, adapter_name="late")
