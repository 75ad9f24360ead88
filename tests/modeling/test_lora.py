"""Adapters on the pipeline: what is saved draws the same after loading, and nothing stays behind."""

import pytest
import torch
from diffusers import TaylorSeerCacheConfig
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from echo4o import Echo4oPipeline
from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from tests.modeling.conftest import GOLDEN

KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "patterns": {"rank_pattern": {r"layers.0.gen.to_q": 7, "to_k": 2}, "alpha_pattern": {"layers.1.gen.to_v": 40}},
}


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


@pytest.fixture
def adapters(fresh, tmp_path):
    """A function that saves an adapter of random weights and returns its folder: by expert, seed, options."""

    def make(expert="gen", seed=0, **options):
        pipe = fresh()
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config(expert=expert, **options))
        folder = tmp_path / f"{expert}-{seed}"
        pipe.save_lora_adapter(folder)
        return folder

    return make


def draw(pipe, **options):
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    return pipe("a dot", generator=torch.Generator().manual_seed(0), **settings, **options).images


def config(kind="plain", expert="gen", **options):
    options = {"r": 4, "lora_alpha": 13, **KINDS[kind], **options}
    return LoraConfig(target_modules=BagelTransformer2DModel._lora_targets[expert], init_lora_weights=False, **options)


def scalings(pipe):
    return {name: dict(m.scaling) for name, m in pipe.transformer.named_modules() if hasattr(m, "scaling")}


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


@pytest.mark.slow
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


@pytest.mark.slow
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
