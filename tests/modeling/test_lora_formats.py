"""Adapters in the formats of other trainers give what the same weights give in our own format, or are refused."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from echo4o.modeling.bagel.transformer_bagel import BagelTransformer2DModel
from echo4o.modeling.common.lora_files import matrix_names
from tests.modeling.lora_adapters import draw

from .conftest import GOLDEN

FILE = "pytorch_lora_weights.safetensors"
NAMES = BagelTransformer2DModel._original_names


@pytest.fixture
def unadapted(pipe):
    """The golden pipeline; adapters are unloaded afterwards."""
    yield pipe
    pipe.unload_lora_weights()


@pytest.fixture
def saved(unadapted, tmp_path):
    """Our own file of an adapter with two ranks and two alphas, and what it generates."""
    torch.manual_seed(0)
    settings = LoraConfig(
        r=4,
        lora_alpha=13,
        target_modules=BagelTransformer2DModel._lora_targets["both"],
        rank_pattern={"layers.0.gen.to_q": 2},
        alpha_pattern={"layers.1.und.to_v": 5},
        init_lora_weights=False,
    )
    unadapted.transformer.add_adapter(settings)
    unadapted.save_lora_adapter(tmp_path / "own")
    wanted = draw(unadapted)
    unadapted.unload_lora_weights()
    return load_file(tmp_path / "own" / FILE), wanted


def original(module: str) -> str:
    return next(re.fullmatch(p, module).expand(t) for p, t in NAMES.items() if re.fullmatch(p, module))


def modules_of(state) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Module -> its two matrices and its alpha."""
    stems = {name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in state}
    alpha = {"layers.1.und.to_v": 5.0}
    parts = {s: [state[f"transformer.{s}.lora_{x}.weight"] for x in "AB"] for s in sorted(stems)}
    return {stem: (a, b, alpha.get(stem, 13.0)) for stem, (a, b) in parts.items()}


def flat(name: str) -> str:
    return name.replace(".", "_")


FORMATS = {
    "kohya": lambda m: (f"lora_unet_{flat(m)}", "lora_down", "lora_up"),
    "kohya, original names": lambda m: (f"lora_unet_{flat(original(m))}", "lora_down", "lora_up"),
    "ComfyUI": lambda m: (f"diffusion_model.{m}", "lora_A", "lora_B"),
    "ComfyUI, original names": lambda m: (f"diffusion_model.{original(m)}", "lora_A", "lora_B"),
    "original names": lambda m: (original(m), "lora_down", "lora_up"),
    "our names with alphas": lambda m: (f"transformer.{m}", "lora_A", "lora_B"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_files_of_other_trainers_generate_the_same(unadapted, saved, tmp_path, form):
    state, wanted = saved
    foreign = {}
    for module, (down, up, alpha) in modules_of(state).items():
        stem, first, second = FORMATS[form](module)
        foreign |= {
            f"{stem}.{first}.weight": down,
            f"{stem}.{second}.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    save_file(foreign, tmp_path / "foreign.safetensors")
    unadapted.load_lora_weights(tmp_path / "foreign.safetensors", adapter_name="foreign")
    assert torch.equal(draw(unadapted), wanted)
    unadapted.save_lora_adapter(tmp_path / "again", "foreign")
    unadapted.unload_lora_weights()
    unadapted.load_lora_weights(tmp_path / "again")
    assert torch.equal(draw(unadapted), wanted)


def test_adapters_that_peft_trained_on_the_original_model(unadapted, saved, tmp_path):
    """Names and patterns of the configuration are those of the original's modules."""
    state, wanted = saved

    class Original(nn.Module):
        """The original's tree of modules, as far as adapters need it."""

    tree = Original()
    for module, (down, up, _) in modules_of(state).items():
        *path, last = original(module).split(".")
        owner = tree
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(last, nn.Linear(down.shape[1], up.shape[0]))
    settings = LoraConfig(
        r=4,
        lora_alpha=13,
        target_modules=r".*\.(self_attn|mlp|mlp_moe_gen)\.(q|k|v|o|gate|up|down)_proj(_moe_gen)?",
        rank_pattern={r"layers.0.self_attn.q_proj_moe_gen": 2},
        alpha_pattern={r"layers.1.self_attn.v_proj": 5},
    )
    get_peft_model(tree, settings).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = {}
    for module, (down, up, _) in modules_of(state).items():
        for part, tensor in (("A", down), ("B", up)):
            weights[f"base_model.model.{original(module)}.lora_{part}.weight"] = tensor
    assert {n: t.shape for n, t in load_file(file).items()} == {n: t.shape for n, t in weights.items()}
    save_file(weights, file)
    unadapted.load_lora_weights(tmp_path)
    assert torch.equal(draw(unadapted), wanted)


def kohya(state, without: str = "", **more) -> dict[str, torch.Tensor]:
    foreign = {}
    for module, (down, up, alpha) in modules_of(state).items():
        stem = f"lora_unet_{flat(module)}"
        foreign |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return {name: tensor for name, tensor in foreign.items() if not without or without not in name} | more


@pytest.mark.parametrize(
    "change, words",
    [
        ({"without": ".alpha"}, "has no configuration, so that its alpha is unknown"),
        ({"without": "layers_0_gen_to_q.alpha"}, "its alpha is unknown"),
        ({"without": "layers_0_gen_to_q.lora_up"}, "layers.0.gen.to_q has lora_A.weight and must have"),
        ({"lora_te_text_model_fc1.lora_down.weight": torch.zeros(4, 8)}, "its alpha is unknown"),
        ({"lora_unet_layers_0_gen_to_q.dora_scale": torch.ones(1)}, "its alpha is unknown"),
    ],
)
def test_what_is_not_exact_is_refused(unadapted, saved, tmp_path, change, words):
    save_file(kohya(saved[0], **change), tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=words):
        unadapted.load_lora_weights(tmp_path / "foreign.safetensors")
    assert not getattr(unadapted.transformer, "peft_config", None)


def test_a_module_under_two_names_is_refused(unadapted, saved, tmp_path):
    down, up, alpha = modules_of(saved[0])["layers.0.gen.to_q"]
    twice = {}
    for stem in ("diffusion_model.layers.0.gen.to_q", original("layers.0.gen.to_q")):
        twice |= {f"{stem}.lora_A.weight": down.clone(), f"{stem}.lora_B.weight": up.clone()}
        twice |= {f"{stem}.alpha": torch.tensor(alpha)}
    save_file(twice, tmp_path / "twice.safetensors", {"note": json.dumps("two")})
    with pytest.raises(ValueError, match="its alpha is unknown"):
        unadapted.load_lora_weights(tmp_path / "twice.safetensors")


def test_the_names_are_those_of_the_original_layout(pipe):
    """The checkpoint in the original layout has the same matrices under these names."""
    stored = load_file(GOLDEN / "checkpoint/ema.safetensors")
    for module in matrix_names(pipe.transformer):
        assert torch.equal(stored[f"{original(module)}.weight"], pipe.transformer.get_submodule(module).weight), module
