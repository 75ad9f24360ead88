"""Configurations that the conversion reads: what they may leave out, and what is refused before anything is written."""

import json

import pytest

from echo4o.modeling.bagel import convert
from echo4o.modeling.bagel.convert import convert_to_diffusers, convert_to_original
from tests.modeling.checkpoints import CHECKPOINT, MODEL_FILES, copy_checkpoint, refused

VAE = {"z_channels": 16, "scale_factor": 0.3611, "shift_factor": 0.1159, "ch": 32, "ch_mult": [1, 1, 2, 1]}
VAE |= {"num_res_blocks": 1}


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("llm", {"rope_theta": "x"}, "llm_config.json says rope_theta is 'x', which is not a number above 0"),
        ("llm", {"rope_theta": None}, "rope_theta is None"),
        ("llm", {"rope_theta": float("inf")}, "rope_theta is inf"),
        ("llm", {"rms_norm_eps": None}, "rms_norm_eps is None"),
        ("llm", {"rms_norm_eps": True}, "rms_norm_eps is True"),
        ("llm", {"hidden_size": "64"}, "hidden_size is '64', which is not a whole number from 1 to"),
        ("llm", {"hidden_size": 64.0}, "hidden_size is 64.0"),
        ("llm", {"hidden_size": 66, "num_attention_heads": 3}, "hidden_size 66 is not a multiple of 4"),
        ("llm", {"hidden_size": 60}, "a head is 15 wide, and rotary positions need an even number"),
        ("llm", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llm", {"num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
        ("llm", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        (
            "llm",
            {"num_hidden_layers": 100_000},
            "num_hidden_layers is 100000, which is not a whole number from 1 to 1000",
        ),
        ("llm", {"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not known here"),
        ("llm", {"rope_scaling": {"type": "yarn", "factor": 4}}, "llm_config.json (rope_scaling) says type is 'yarn'"),
        ("llm", {"rope_scaling": {"rope_type": "linear"}}, "rope_type is 'linear'"),
        ("llm", {"rope_scaling": {"factor": 4}}, "which is another architecture"),
        ("llm", {"rope_scaling": "yarn"}, "rope_scaling is 'yarn', which is not an object"),
        ("llm", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ("vit", {"num_attention_heads": 5}, "the ViT's hidden_size 48 is not a multiple of its 5 num_attention_heads"),
        ("vit", {"num_attention_heads": "4"}, "vit_config.json says num_attention_heads is '4'"),
        ("vit", {"hidden_act": "nope"}, "hidden_act is 'nope', which is not known here"),
        ("vit", {"layer_norm_eps": "x"}, "layer_norm_eps is 'x'"),
        ("vit", {"num_channels": None}, "num_channels is None"),
        ("config", {"vae_config": "x"}, "config.json says vae_config is 'x', which is not an object"),
        ("config", {"vae_config": VAE | {"scale_factor": None}}, "config.json (vae_config) says scale_factor is None"),
        ("config", {"vae_config": VAE | {"shift_factor": "x"}}, "shift_factor is 'x'"),
        ("config", {"vae_config": VAE | {"ch": 48}}, "the VAE's widths [48, 48, 96, 48] are not multiples of 32"),
        ("config", {"vae_config": VAE | {"ch_mult": [1, "2"]}}, "ch_mult is [1, '2']"),
        ("config", {"vae_config": VAE | {"ch_mult": []}}, "ch_mult is []"),
        ("config", {"vae_config": VAE | {"num_res_blocks": -1}}, "num_res_blocks is -1"),
        ("config", {"max_latent_size": "big"}, "max_latent_size is 'big'"),
        ("config", {"latent_patch_size": 2.5}, "latent_patch_size is 2.5"),
        ("config", {"connector_act": "nope"}, "connector_act is 'nope'"),
    ],
)
def test_json_files_with_settings_that_no_model_has(tmp_path, file, change, expected):
    src = copy_checkpoint(tmp_path / "src")
    file = src / {"config": "config.json"}.get(file, f"{file}_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    message = refused(src, tmp_path, ValueError)
    assert expected in message and len(message.splitlines()) < 60


def test_json_files_may_leave_out_what_has_a_default(tmp_path):
    src = copy_checkpoint(tmp_path / "src")
    for name, lost in (
        ("llm", ("rms_norm_eps", "rope_theta", "hidden_act")),
        ("vit", ("num_channels", "hidden_act", "layer_norm_eps")),
    ):
        file = src / f"{name}_config.json"
        content = {k: v for k, v in json.loads(file.read_text()).items() if k not in lost}
        if name == "llm":
            content |= {"rope_scaling": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
        file.write_text(json.dumps(content))
    (src / "config.json").write_text(json.dumps({"vae_config": None}))
    convert_to_diffusers(src, tmp_path / "there")
    transformer, vision, vae = (json.loads((tmp_path / f"there/{c}/config.json").read_text()) for c in MODEL_FILES)
    assert (transformer["rope_theta"], transformer["rms_norm_eps"]) == (5e5, 1e-6)
    assert (vision["num_channels"], vision["hidden_act"], vision["layer_norm_eps"]) == (3, "gelu_pytorch_tanh", 1e-6)
    assert vae["scaling_factor"] == 0.3611
    (src / "llm_config.json").unlink()
    (src / "config.json").write_text(json.dumps({"llm_config": "x"}))
    assert "llm_config is 'x', which is not an object" in refused(src, tmp_path / "other", ValueError)


def test_arguments_that_a_class_refuses_are_found_before_anything_is_written(tmp_path, monkeypatch):
    def refuse(name):
        raise TypeError(f"no {name} today")

    monkeypatch.setattr(convert, "_model_class", lambda component: lambda **options: refuse(component))
    message = refused(CHECKPOINT, tmp_path, ValueError)
    assert "does not fit (3)" in message and "vae cannot be built: TypeError: no vae today" in message


@pytest.mark.parametrize(
    ("component", "change", "expected"),
    [
        ("transformer", {"hidden_size": "64"}, "transformer/config.json says hidden_size is '64'"),
        ("transformer", {"num_attention_heads": 0}, "transformer/config.json says num_attention_heads is 0"),
        ("transformer", {"rope_theta": None}, "transformer/config.json says rope_theta is None"),
        ("vision_model", {"hidden_act": None}, "vision_model/config.json does not say hidden_act"),
        ("vision_model", {"patch_size": -14}, "vision_model/config.json says patch_size is -14"),
        ("vae", {"block_out_channels": [32, None]}, "vae/config.json says block_out_channels is [32, None]"),
        ("vae", {"scaling_factor": "x"}, "vae/config.json says scaling_factor is 'x'"),
    ],
)
def test_way_back_checks_configurations(tmp_path, component, change, expected):
    convert_to_diffusers(CHECKPOINT, tmp_path / "there")
    file = tmp_path / "there" / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as caught:
        convert_to_original(tmp_path / "there", tmp_path / "dst")
    assert expected in str(caught.value) and not (tmp_path / "dst").exists()
