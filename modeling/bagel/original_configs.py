"""Reads and writes the JSON files of the original layout: model sizes, and the configurations of the components."""

import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from ..common.weights import StoredTensor, read_json
from .original_keys import Sizes

LATENT_SCALING, LATENT_SHIFT = 0.3611, 0.1159  # FLUX's VAE, which the release uses
JSON_FILES = ("llm_config.json", "vit_config.json", "config.json", "generation_config.json")

Configs = dict[str, dict[str, Any]]  # component -> arguments of its class
_MOST = 1 << 24  # larger sizes are taken for errors
_MOST_LAYERS = 1000
_NORM_GROUPS = 32  # of the VAE's group norms, in the original as in diffusers
_ABSENT: Any = object()


class ConfigReader:
    """Reads checked entries of a JSON object. Every invalid entry adds a line to `problems`.

    An entry with a default may be absent, but not null.

    Args:
        content: the object.
        file: its name in messages.
        problems: list that the lines are appended to.
    """

    def __init__(self, content: Mapping[str, Any], file: str, problems: list[str]):
        self.content, self.file, self.problems = content, file, problems

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def integer(self, key: str, default: Any = _ABSENT, most: int = _MOST) -> int:
        """An integer from 1 to `most`."""
        return self._read(
            key, default, 1, lambda v: type(v) is int and 1 <= v <= most, f"a whole number from 1 to {most}"
        )

    def positive(self, key: str, default: Any = _ABSENT) -> float:
        """A finite number above 0."""
        return self._read(key, default, 1.0, lambda v: _is_number(v) and v > 0, "a number above 0")

    def number(self, key: str, default: Any = _ABSENT) -> float:
        """A finite number."""
        return self._read(key, default, 0.0, _is_number, "a number")

    def choice(self, key: str, known: Container[str], default: Any = _ABSENT) -> str:
        """One of the known names."""
        return self._read(key, default, "", lambda v: isinstance(v, str) and v in known, "known here")

    def integers(self, key: str) -> list[int]:
        """A list of 1 to 20 positive integers."""

        def fits(value: Any) -> bool:
            return isinstance(value, list) and 0 < len(value) <= 20 and all(type(v) is int and v > 0 for v in value)

        return self._read(key, _ABSENT, [1], fits, "a list of positive whole numbers")

    def section(self, key: str) -> "ConfigReader":
        """A reader of an object inside this one; an absent or null entry counts as an empty object."""
        value = self.content.get(key)
        if not isinstance(value, dict | None):
            self.problems.append(f"{self.file} says {key} is {value!r}, which is not an object")
        return ConfigReader(value if isinstance(value, dict) else {}, f"{self.file} ({key})", self.problems)

    def _read(self, key: str, default: Any, spare: Any, fits: Callable[[Any], bool], wanted: str) -> Any:
        value = self.content.get(key, default)
        if value is _ABSENT:
            self.problems.append(f"{self.file} does not say {key}")
        elif fits(value) or (value is default and key not in self.content):
            return value
        else:
            self.problems.append(f"{self.file} says {key} is {value!r}, which is not {wanted}")
        return spare


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def read_original_jsons(folder: Path) -> tuple[dict, dict, dict]:
    """Read llm_config, vit_config and config of a folder.

    config.json may be absent; llm_config and vit_config may be sections of it instead of files.

    Raises FileNotFoundError for missing files and ValueError for files that are not JSON objects.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    found = {}
    for name in ("llm_config", "vit_config"):
        file = folder / f"{name}.json"
        found[name] = read_json(file) if file.is_file() else config.get(name)
    lost = [f"{name}.json" for name, value in found.items() if not value]
    if lost:
        raise FileNotFoundError(f"{folder} is not an original BAGEL checkpoint: it lacks {', '.join(lost)}.")
    for name, value in found.items():
        if not isinstance(value, dict):
            raise ValueError(f"{folder / 'config.json'} says {name} is {value!r}, which is not an object.")
    return found["llm_config"], found["vit_config"], config


def original_sizes(
    llm: dict, vit: dict, config: dict, ema: Mapping[str, StoredTensor], ae: Mapping[str, StoredTensor]
) -> tuple[Sizes, list[str]]:
    """The sizes of an original checkpoint, and one line per problem.

    The sizes of the language model and the vision tower come from the JSON files, so that a single wrong tensor is
    found. The sides of the position tables come from the tables, because the entries of the release's config.json
    disagree with them. A size that is known from neither is 0, which listings show as `?`.
    """
    problems: list[str] = []
    readers = _readers(llm, vit, config, problems)
    return _sizes(*readers, ema, ae, problems), problems


def _sizes(
    llm: ConfigReader,
    vit: ConfigReader,
    config: ConfigReader,
    ema: Mapping[str, StoredTensor],
    ae: Mapping[str, StoredTensor],
    problems: list[str],
) -> Sizes:

    def side(fallback: int | None, *names: str) -> int:
        """The side of a square position table, which has one row per position."""
        rows = _dim(ema, 0, *names)
        if math.isqrt(rows) ** 2 != rows:
            problems.append(f"{names[0]} has {rows} rows, which is not a square number")
        return math.isqrt(rows) or fallback or 0

    vae = config.section("vae_config")
    channels = vae.integer("z_channels", _dim(ae, 1, "decoder.conv_in.weight"))
    patch_values = _dim(ema, 1, "vae2llm.weight") or _dim(ema, 0, "llm2vae.weight")
    heads = llm.integer("num_attention_heads")
    sizes = Sizes(
        hidden=llm.integer("hidden_size"),
        intermediate=llm.integer("intermediate_size"),
        layers=llm.integer("num_hidden_layers", most=_MOST_LAYERS),
        heads=heads,
        kv_heads=llm.integer("num_key_value_heads", heads),
        vocabulary=llm.integer("vocab_size"),
        latent_channels=channels,
        latent_patch=config.integer("latent_patch_size", math.isqrt(patch_values // max(1, channels))),
        latent_side=side(config.integer("max_latent_size", 0), "latent_pos_embed.pos_embed"),
        vit_hidden=vit.integer("hidden_size"),
        vit_intermediate=vit.integer("intermediate_size"),
        # The original builds one layer fewer than vit_config.json counts, and stores what it builds.
        vit_layers=vit.integer("num_hidden_layers", most=_MOST_LAYERS) - 1,
        vit_patch_values=vit.integer("patch_size") ** 2 * vit.integer("num_channels", 3),
        vit_side=side(
            config.integer("vit_max_num_patch_per_side", 0),
            "vit_model.vision_model.embeddings.position_embedding.weight",
            "vit_pos_embed.pos_embed",
        ),
        vae_channels=_vae_channels(vae, ae),
        vae_blocks=vae.integer("num_res_blocks", _count(ae, "encoder.down.0.block.{}.conv1.weight"), _MOST_LAYERS),
    )
    vit_heads = vit.integer("num_attention_heads")
    if not problems:
        _check_sizes(sizes, vit_heads, problems)
    return sizes


def _readers(
    llm: dict, vit: dict, config: dict, problems: list[str]
) -> tuple[ConfigReader, ConfigReader, ConfigReader]:
    return (
        ConfigReader(llm, "llm_config.json", problems),
        ConfigReader(vit, "vit_config.json", problems),
        ConfigReader(config, "config.json", problems),
    )


def _check_sizes(s: Sizes, vit_heads: int, problems: list[str]) -> None:
    """Add a line per size that does not fit the others, as the original's classes and ours need it."""
    if s.hidden % s.heads:
        problems.append(f"hidden_size {s.hidden} is not a multiple of num_attention_heads {s.heads}")
    elif s.hidden // s.heads % 2:
        problems.append(f"a head is {s.hidden // s.heads} wide, and rotary positions need an even number")
    if s.heads % s.kv_heads:
        problems.append(f"num_attention_heads {s.heads} is not a multiple of num_key_value_heads {s.kv_heads}")
    if s.hidden % 4:
        problems.append(f"hidden_size {s.hidden} is not a multiple of 4, as its position tables need")
    if s.vit_hidden % vit_heads:
        problems.append(
            f"the ViT's hidden_size {s.vit_hidden} is not a multiple of its {vit_heads} num_attention_heads"
        )
    if s.vae_channels != (1,) and any(c % _NORM_GROUPS for c in s.vae_channels):
        problems.append(
            f"the VAE's widths {list(s.vae_channels)} are not multiples of {_NORM_GROUPS}, as its norms need"
        )


def _dim(tensors: Mapping[str, StoredTensor], axis: int, *names: str) -> int:
    """One dimension of the first of these tensors that exists; 0 if none does."""
    return next((tensors[n].shape[axis] for n in names if n in tensors and len(tensors[n].shape) > axis), 0)


def _vae_channels(vae: ConfigReader, ae: Mapping[str, StoredTensor]) -> tuple[int, ...]:
    if "ch" in vae and "ch_mult" in vae:
        return tuple(vae.integer("ch") * m for m in vae.integers("ch_mult"))
    name = "encoder.down.{}.block.0.conv1.weight"
    return tuple(ae[name.format(i)].shape[0] for i in range(_count(ae, name))) or (1,)


def _count(tensors: Mapping[str, StoredTensor], name: str) -> int:
    count = 0
    while name.format(count) in tensors:
        count += 1
    return count


def component_configs(llm: dict, vit: dict, config: dict, sizes: Sizes, problems: list[str] | None = None) -> Configs:
    """The arguments of our components' classes. Absent entries have the defaults of the original's classes.

    Every entry that is invalid or describes another architecture adds a line to `problems`.
    """
    from transformers.activations import ACT2FN

    llm_in, vit_in, config_in = _readers(llm, vit, config, [] if problems is None else problems)
    vae = config_in.section("vae_config")
    llm_in.choice("hidden_act", ("silu",), "silu")
    parameters, scaling = llm_in.section("rope_parameters"), llm_in.section("rope_scaling")
    for part, key in ((parameters, "rope_type"), (scaling, "rope_type"), (scaling, "type")):
        part.choice(key, ("default",), "default")
    if scaling.content and not {"type", "rope_type"} & set(scaling.content):
        scaling.problems.append(f"{scaling.file} has {scaling.content!r}, which is another architecture")
    rope = llm_in.positive("rope_theta", None) or parameters.positive("rope_theta", 10000.0)
    transformer = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocabulary,
        "rms_norm_eps": llm_in.positive("rms_norm_eps", 1e-6),
        "rope_theta": rope,
        "latent_channels": sizes.latent_channels,
        "latent_patch_size": sizes.latent_patch,
        "max_latent_size": sizes.latent_side,
    }
    vision = {
        "hidden_size": sizes.vit_hidden,
        "intermediate_size": sizes.vit_intermediate,
        "num_layers": sizes.vit_layers,
        "num_attention_heads": vit_in.integer("num_attention_heads"),
        "patch_size": vit_in.integer("patch_size"),
        "num_channels": vit_in.integer("num_channels", 3),
        "hidden_act": vit_in.choice("hidden_act", ACT2FN, "gelu_pytorch_tanh"),
        "layer_norm_eps": vit_in.positive("layer_norm_eps", 1e-6),
        "max_patches_per_side": sizes.vit_side,
        "connector_act": config_in.choice("connector_act", ACT2FN, "gelu_pytorch_tanh"),
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
        "norm_num_groups": _NORM_GROUPS,
        "sample_size": 1024,
        "scaling_factor": vae.positive("scale_factor", LATENT_SCALING),
        "shift_factor": vae.number("shift_factor", LATENT_SHIFT),
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": True,
    }
    return {"transformer": transformer, "vision_model": vision, "vae": autoencoder}


def sizes_of(configs: Configs) -> Sizes:
    """The sizes in our components' configurations. Raises ValueError listing missing and invalid entries."""
    problems: list[str] = []
    llm, vit, vae = (
        ConfigReader(configs[c], f"{c}/config.json", problems) for c in ("transformer", "vision_model", "vae")
    )
    sizes = Sizes(
        hidden=llm.integer("hidden_size"),
        intermediate=llm.integer("intermediate_size"),
        layers=llm.integer("num_layers", most=_MOST_LAYERS),
        heads=llm.integer("num_attention_heads"),
        kv_heads=llm.integer("num_key_value_heads"),
        vocabulary=llm.integer("vocab_size"),
        latent_channels=llm.integer("latent_channels"),
        latent_patch=llm.integer("latent_patch_size"),
        latent_side=llm.integer("max_latent_size"),
        vit_hidden=vit.integer("hidden_size"),
        vit_intermediate=vit.integer("intermediate_size"),
        vit_layers=vit.integer("num_layers", most=_MOST_LAYERS) if vit.content.get("num_layers") != 0 else 0,
        vit_patch_values=vit.integer("patch_size") ** 2 * vit.integer("num_channels"),
        vit_side=vit.integer("max_patches_per_side"),
        vae_channels=tuple(vae.integers("block_out_channels")),
        vae_blocks=vae.integer("layers_per_block", most=_MOST_LAYERS),
    )
    vit_heads = vit.integer("num_attention_heads")
    if not problems:
        _check_sizes(sizes, vit_heads, problems)
    for reader, key in ((llm, "rms_norm_eps"), (llm, "rope_theta"), (vit, "layer_norm_eps"), (vae, "scaling_factor")):
        reader.positive(key)
    vae.number("shift_factor")
    for key in ("hidden_act", "connector_act"):
        if not isinstance(vit.content.get(key), str):
            problems.append(f"{vit.file} does not say {key}")
    if problems:
        raise ValueError("The checkpoint's sizes cannot be read:\n  " + "\n  ".join(problems))
    return sizes


def original_jsons(configs: Configs, dtype: str, token_ids: Mapping[str, int]) -> Configs:
    """File name -> content of the original's JSON files, made from the components' configurations.

    Args:
        dtype: name of the weights' dtype in torch ("bfloat16").
        token_ids: special tokens of the tokenizer -> their ids.
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
