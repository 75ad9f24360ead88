"""The original's JSON files and ours: sizes and configurations read from one, written for the other."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .original_keys import Sizes
from .weights_bagel import StoredTensor, read_json

LATENT_SCALING, LATENT_SHIFT = 0.3611, 0.1159  # FLUX's VAE, which the release uses
JSON_FILES = ("llm_config.json", "vit_config.json", "config.json", "generation_config.json")

Configs = dict[str, dict[str, Any]]  # component -> arguments of its class


def read_original_jsons(folder: Path) -> tuple[dict, dict, dict]:
    """llm_config, vit_config and config of a folder; config may be empty, the others may come out of it.

    Raises FileNotFoundError naming what is lacking.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    found = {}
    for name in ("llm_config", "vit_config"):
        file = folder / f"{name}.json"
        found[name] = read_json(file) if file.is_file() else config.get(name)
    lost = [f"{name}.json" for name, value in found.items() if not value]
    if lost:
        raise FileNotFoundError(f"{folder} is no original BAGEL checkpoint: it lacks {', '.join(lost)}.")
    return found["llm_config"], found["vit_config"], config


def original_sizes(
    llm: dict, vit: dict, config: dict, ema: Mapping[str, StoredTensor], ae: Mapping[str, StoredTensor]
) -> tuple[Sizes, list[str]]:
    """The sizes of an original checkpoint, and one line for each thing that cannot be told or does not fit.

    The JSON files tell the language model's and the tower's sizes, so that a single wrong tensor stands out. Table
    sides come from the tables, because what the release's config.json says could not be checked. What neither tells
    is 0, which a listing shows as `?`.
    """
    problems: list[str] = []

    def told(source: dict, file: str, key: str) -> int:
        value = source.get(key)
        if not isinstance(value, int) or value < 1:
            problems.append(f"{file} does not say {key}" if value is None else f"{file} says {key} is {value!r}")
            return 1
        return value

    def side(fallback: int | None, *names: str) -> int:
        """The side of a square table, one row for each position."""
        rows = _dim(ema, 0, *names)
        if math.isqrt(rows) ** 2 != rows:
            problems.append(f"{names[0]} has {rows} rows, which is no square number")
        return math.isqrt(rows) or fallback or 0

    def llm_says(key: str) -> int:
        return told(llm, "llm_config.json", key)

    def vit_says(key: str) -> int:
        return told(vit, "vit_config.json", key)

    vae = config.get("vae_config") or {}
    latent_channels = vae.get("z_channels") or _dim(ae, 1, "decoder.conv_in.weight")
    patch_values = _dim(ema, 1, "vae2llm.weight") or _dim(ema, 0, "llm2vae.weight")
    sizes = Sizes(
        hidden=llm_says("hidden_size"),
        intermediate=llm_says("intermediate_size"),
        layers=llm_says("num_hidden_layers"),
        heads=llm_says("num_attention_heads"),
        kv_heads=llm.get("num_key_value_heads") or llm_says("num_attention_heads"),
        vocabulary=llm_says("vocab_size"),
        latent_channels=latent_channels,
        latent_patch=config.get("latent_patch_size") or math.isqrt(patch_values // max(1, latent_channels)),
        latent_side=side(config.get("max_latent_size"), "latent_pos_embed.pos_embed"),
        vit_hidden=vit_says("hidden_size"),
        vit_intermediate=vit_says("intermediate_size"),
        # The original builds one layer fewer than vit_config.json counts, and stores what it builds.
        vit_layers=vit_says("num_hidden_layers") - 1,
        vit_patch_values=vit_says("patch_size") ** 2 * vit.get("num_channels", 3),
        vit_side=side(
            config.get("vit_max_num_patch_per_side"),
            "vit_model.vision_model.embeddings.position_embedding.weight",
            "vit_pos_embed.pos_embed",
        ),
        vae_channels=_vae_channels(vae, ae),
        vae_blocks=vae.get("num_res_blocks") or _count(ae, "encoder.down.0.block.{}.conv1.weight"),
    )
    if sizes.hidden % sizes.heads:
        problems.append(f"hidden_size {sizes.hidden} is no multiple of num_attention_heads {sizes.heads}")
    vit_says("num_attention_heads")
    return sizes, problems


def _dim(tensors: Mapping[str, StoredTensor], axis: int, *names: str) -> int:
    """One dimension of the first of these tensors that is there; 0 without any."""
    return next((tensors[n].shape[axis] for n in names if n in tensors and len(tensors[n].shape) > axis), 0)


def _vae_channels(vae: dict, ae: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    if vae.get("ch") and vae.get("ch_mult"):
        return tuple(vae["ch"] * m for m in vae["ch_mult"])
    name = "encoder.down.{}.block.0.conv1.weight"
    return tuple(ae[name.format(i)].shape[0] for i in range(_count(ae, name))) or (1,)


def _count(tensors: Mapping[str, StoredTensor], name: str) -> int:
    count = 0
    while name.format(count) in tensors:
        count += 1
    return count


def component_configs(llm: dict, vit: dict, config: dict, sizes: Sizes) -> Configs:
    """The arguments of our components' classes. Absent entries take the defaults of the original's own classes."""
    vae = config.get("vae_config") or {}
    rope = llm.get("rope_theta") or (llm.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    transformer = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "rms_norm_eps": llm.get("rms_norm_eps", 1e-6),
        "rope_theta": rope,
        "latent_channels": sizes.latent_channels,
        "latent_patch_size": sizes.latent_patch,
        "max_latent_size": sizes.latent_side,
    }
    vision = {
        "hidden_size": sizes.vit_hidden,
        "intermediate_size": sizes.vit_intermediate,
        "num_layers": sizes.vit_layers,
        "num_attention_heads": vit["num_attention_heads"],
        "patch_size": vit["patch_size"],
        "num_channels": vit.get("num_channels", 3),
        "hidden_act": vit.get("hidden_act", "gelu_pytorch_tanh"),
        "layer_norm_eps": vit.get("layer_norm_eps", 1e-6),
        "max_patches_per_side": sizes.vit_side,
        "connector_act": config.get("connector_act", "gelu_pytorch_tanh"),
        "output_size": sizes.hidden,
    }
    levels = len(sizes.vae_channels)
    autoencoder = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(sizes.vae_channels),
        "layers_per_block": sizes.vae_blocks,
        "act_fn": "silu",
        "latent_channels": sizes.latent_channels,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": vae.get("scale_factor", LATENT_SCALING),
        "shift_factor": vae.get("shift_factor", LATENT_SHIFT),
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }
    return {"transformer": transformer, "vision_model": vision, "vae": autoencoder}


def sizes_of(configs: Configs) -> Sizes:
    """The sizes that our components' configurations state; ValueError listing entries that are lacking."""
    wanted = {
        "transformer": (
            "hidden_size intermediate_size num_layers num_attention_heads num_key_value_heads vocab_size "
            "rms_norm_eps rope_theta latent_channels latent_patch_size max_latent_size"
        ),
        "vision_model": (
            "hidden_size intermediate_size num_layers num_attention_heads patch_size num_channels hidden_act "
            "layer_norm_eps max_patches_per_side connector_act output_size"
        ),
        "vae": "block_out_channels layers_per_block latent_channels scaling_factor shift_factor",
    }
    lost = [
        f"{c}/config.json does not say {k}" for c, keys in wanted.items() for k in keys.split() if k not in configs[c]
    ]
    if lost:
        raise ValueError("The checkpoint's sizes cannot be told:\n  " + "\n  ".join(lost))
    llm, vit, vae = configs["transformer"], configs["vision_model"], configs["vae"]
    return Sizes(
        hidden=llm["hidden_size"],
        intermediate=llm["intermediate_size"],
        layers=llm["num_layers"],
        heads=llm["num_attention_heads"],
        kv_heads=llm["num_key_value_heads"],
        vocabulary=llm["vocab_size"],
        latent_channels=llm["latent_channels"],
        latent_patch=llm["latent_patch_size"],
        latent_side=llm["max_latent_size"],
        vit_hidden=vit["hidden_size"],
        vit_intermediate=vit["intermediate_size"],
        vit_layers=vit["num_layers"],
        vit_patch_values=vit["patch_size"] ** 2 * vit["num_channels"],
        vit_side=vit["max_patches_per_side"],
        vae_channels=tuple(vae["block_out_channels"]),
        vae_blocks=vae["layers_per_block"],
    )


def original_jsons(configs: Configs, dtype: str, token_ids: Mapping[str, int]) -> Configs:
    """File name -> content of the original's JSON files, for components that carry none along.

    `dtype` is the name torch gives it ("bfloat16"); `token_ids` holds the tokenizer's special tokens.
    """
    llm_in, vit_in, vae_in = configs["transformer"], configs["vision_model"], configs["vae"]
    special = {"bos_token_id": token_ids.get("<|endoftext|>"), "eos_token_id": token_ids.get("<|im_end|>")}
    special = {k: v for k, v in special.items() if v is not None}
    llm = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        **special,
        "hidden_act": "silu",
        "hidden_size": llm_in["hidden_size"],
        "initializer_range": 0.02,
        "intermediate_size": llm_in["intermediate_size"],
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": llm_in["num_attention_heads"],
        "num_hidden_layers": llm_in["num_layers"],
        "num_key_value_heads": llm_in["num_key_value_heads"],
        "rms_norm_eps": llm_in["rms_norm_eps"],
        "rope_theta": llm_in["rope_theta"],
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": llm_in["vocab_size"],
    }
    copied = ("patch_size", "num_channels", "hidden_act", "layer_norm_eps", "hidden_size", "intermediate_size")
    vit = {
        "model_type": "siglip_vision_model",
        "attention_dropout": 0.0,
        **{k: vit_in[k] for k in (*copied, "num_attention_heads")},
        "num_hidden_layers": vit_in["num_layers"] + 1,
        "image_size": vit_in["patch_size"] * vit_in["max_patches_per_side"],
    }
    base = math.gcd(*vae_in["block_out_channels"])
    config = {
        "architectures": ["BagelForConditionalGeneration"],
        "model_type": "bagel",
        "visual_gen": True,
        "visual_und": True,
        "latent_patch_size": llm_in["latent_patch_size"],
        "max_latent_size": llm_in["max_latent_size"],
        "vit_max_num_patch_per_side": vit_in["max_patches_per_side"],
        "connector_act": vit_in["connector_act"],
        "interpolate_pos": False,
        "timestep_shift": 1.0,
        "llm_config": llm,
        "vit_config": vit,
        "vae_config": {
            "resolution": 256,
            "in_channels": 3,
            "downsample": 2 ** (len(vae_in["block_out_channels"]) - 1),
            "out_ch": 3,
            "z_channels": vae_in["latent_channels"],
            "scale_factor": vae_in["scaling_factor"],
            "shift_factor": vae_in["shift_factor"],
            "ch": base,
            "ch_mult": [c // base for c in vae_in["block_out_channels"]],
            "num_res_blocks": vae_in["layers_per_block"],
        },
    }
    return {"llm_config.json": llm, "vit_config.json": vit, "config.json": config, "generation_config.json": special}


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, with sorted keys."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
