"""The original's checkpoint: what lies where, under which names, and the component configurations that follow.

    config.json, model*.safetensors (with an index when there are several)    language model, head, queries, often EVA
    tokenizer files, generation_config.json, preprocessor_config.json
    diffusion-decoder/{model_index.json, scheduler/, feature_extractor/, unet/, vae/}
    eva_clip_vision_tower/pytorch_model.bin                                   inside or beside the folder, if not above

Sizes that the original writes nowhere are read off the tensors. A few constants are neither stored nor visible there;
they are the release's, unless config.json has a section `tiny` with others.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.safetensors_stream import LoadedTensor
from ..common.weights import StoredTensor, component_tensors, read_json

DECODER = "diffusion-decoder"
DECODER_VARIANT = "bf16"  # in the names of the decoder's weight files
EVA_FILE = "eva_clip_vision_tower/pytorch_model.bin"
HEAD, QUERIES, EVA = "model.dit.model.", "model.latent_queries", "model.gen_vision_tower.vision_tower.model."
EVA_HEAD_DIM, FEATURES_PER_SIDE, NORM_EPS = 112, 8, 1e-5
NO_LIMIT_CONFIG = {"min_pixels": 3136, "max_pixels": 12845056}  # Qwen2.5-VL's image processor
# Keys of config.json that are not the language model's.
OWN_KEYS = ("tiny", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype")

Configs = dict[str, dict[str, Any]]  # component -> configuration


@dataclass(frozen=True)
class TensorNames:
    """A tensor's component and name with us, and its name in the original's file of that component."""

    component: str
    name: str
    original: str


@dataclass(frozen=True)
class Blip3oCheckpoint:
    """An original checkpoint: where each tensor lies, and what our components are built with.

    Args:
        tensors: component -> tensors by our names.
        eva: where the EVA tower lies: "checkpoint", "file" or "absent".
    """

    folder: Path
    tensors: dict[str, dict[str, StoredTensor]]
    configs: Configs
    eva: str


def key_of(original: str) -> TensorNames:
    """Where a tensor of the original's language model checkpoint belongs."""
    if original == QUERIES:
        return TensorNames("transformer", "queries.weight", original)
    if original.startswith(HEAD):
        return TensorNames("transformer", original.removeprefix(HEAD), original)
    if original.startswith(EVA):
        return TensorNames("vision_model", original.removeprefix(EVA), original)
    if original.startswith("visual."):
        return TensorNames("language_model", f"model.{original}", original)
    if original.startswith("model."):
        return TensorNames("language_model", f"model.language_model.{original.removeprefix('model.')}", original)
    return TensorNames("language_model", original, original)


def original_name(component: str, name: str) -> str:
    """The name of one of our tensors in the original's language model checkpoint; the inverse of [`key_of`]."""
    if component == "transformer":
        return QUERIES if name == "queries.weight" else HEAD + name
    if component == "vision_model":
        return EVA + name
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


# --- reading ---------------------------------------------------------------------------------------------------------


def read_original(folder: Path) -> Blip3oCheckpoint:
    """Read the headers and JSON files of an original checkpoint.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: sizes that cannot be read, or settings that are not supported.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    _require_files(folder)
    config = read_json(folder / "config.json")
    tensors: dict[str, dict[str, StoredTensor]] = {"language_model": {}, "transformer": {}, "vision_model": {}}
    for name, stored in component_tensors(folder).items():
        key = key_of(name)
        tensors[key.component][key.name] = stored
    eva = "checkpoint" if tensors["vision_model"] else "absent"
    if eva == "absent" and (file := eva_file(folder)):
        tensors["vision_model"], eva = read_eva(file), "file"
    if eva == "absent":
        del tensors["vision_model"]
    for part in ("unet", "vae"):
        tensors[part] = component_tensors(folder / DECODER / part, DECODER_VARIANT)
    return Blip3oCheckpoint(folder, tensors, component_configs(folder, config, tensors), eva)


def _require_files(folder: Path) -> None:
    wanted = ["config.json", f"{DECODER}/model_index.json", f"{DECODER}/scheduler/scheduler_config.json"]
    wanted += [f"{DECODER}/{part}/config.json" for part in ("unet", "vae")]
    lost = [name for name in wanted if not (folder / name).is_file()]
    if not (folder / "vocab.json").is_file() and not (folder / "tokenizer.json").is_file():
        lost.append("the tokenizer's files")
    if lost:
        hint = ""
        if any(name.startswith(DECODER) for name in lost):
            hint = f" The original's training does not copy {DECODER}/: take it from the release."
        raise FileNotFoundError(f"{folder} is not an original BLIP3-o checkpoint: it lacks {', '.join(lost)}.{hint}")


def eva_file(folder: Path) -> Path | None:
    """The file of the EVA tower, which the original downloads from a repository of its own."""
    places = (folder / EVA_FILE, folder.parent / EVA_FILE)
    return next((file for file in places if file.is_file()), None)


def read_eva(file: Path) -> dict[str, StoredTensor]:
    """The tensors of the EVA tower's pickled state dict, mapped from the file.

    The only pickle that is read; `weights_only=True` builds tensors and nothing else. Raises ValueError if the file
    holds anything else.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for damaged or unsafe pickles
        raise ValueError(f"{file} cannot be read as tensors alone: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} is not a dict of tensors.")
    return {name: LoadedTensor.of(name, values, file) for name, values in state.items()}


# --- configurations ------------------------------------------------------------------------------------------------


def component_configs(folder: Path, config: dict[str, Any], tensors: Mapping[str, Mapping[str, Any]]) -> Configs:
    """The configuration of every component, from config.json, the decoder's JSON files and shapes of tensors.

    Raises ValueError for what is missing, or is not supported.
    """
    tiny = config.get("tiny") or {}
    configs: Configs = {
        "transformer": _head_config(tiny.get("dit_config") or {}, tensors["transformer"]),
        "language_model": _language_config(config),
        "scheduler": {"num_train_timesteps": 1000, "shift": 1.0} | _plain(tiny.get("flow_scheduler") or {}),
        "decoder_scheduler": _plain(read_json(folder / DECODER / "scheduler" / "scheduler_config.json")),
        "image_processor": _processor_config(folder, config),
    }
    if "vision_model" in tensors:
        vision = (tiny.get("gen_vision_tower_config") or {}).get("vision_cfg") or {}
        configs["vision_model"] = _eva_config(vision, config, tensors["vision_model"])
    for part in ("unet", "vae"):
        configs[part] = _plain(read_json(folder / DECODER / part / "config.json"))
    return configs


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _shape(tensors: Mapping[str, StoredTensor], name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors or len(tensors[name].shape) != ndim:
        raise ValueError(f"The checkpoint lacks {name} with {ndim} dimensions, from which sizes are read.")
    return tensors[name].shape


def _layers(tensors: Mapping[str, StoredTensor], prefix: str) -> int:
    numbers = [int(m[1]) for name in tensors if (m := re.match(rf"{prefix}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _head_config(tiny: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    if tiny.get("learn_sigma") or not tiny.get("qk_norm", True):
        raise ValueError("config.json: a head with learn_sigma, or without qk_norm, is not supported.")
    patch = tiny.get("patch_size", 1)
    width, inputs = _shape(tensors, "patch_embedder.proj.weight", 2)
    heads = _shape(tensors, "layers.0.gate", 1)[0]
    queries = _shape(tensors, "queries.weight", 3)
    return {
        "in_channels": inputs // patch**2,
        "sample_size": tiny.get("input_size", FEATURES_PER_SIDE),
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": _layers(tensors, "layers"),
        "num_attention_heads": heads,
        "num_kv_heads": _shape(tensors, "layers.0.attn1.to_k.weight", 2)[0] // (width // heads),
        "ffn_dim": _shape(tensors, "layers.0.feed_forward.linear_1.weight", 2)[0],
        "norm_eps": tiny.get("norm_eps", NORM_EPS),
        "qk_norm": True,
        "condition_dim": queries[2],
        "num_queries": queries[1],
    }


def _eva_config(tiny: dict[str, Any], config: dict[str, Any], tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    pooling = re.fullmatch(r"early_pool2d_(\d+)", str(config.get("gen_pooling")))
    if pooling is None:
        raise ValueError(f"config.json: gen_pooling={config.get('gen_pooling')!r} is not known; early_pool2d_N is.")
    if not tiny.get("postnorm", True) or not tiny.get("qkv_bias", True):
        raise ValueError("config.json: an EVA tower without postnorm or qkv_bias is not supported.")
    width, channels, patch, _ = _shape(tensors, "patch_embed.proj.weight", 4)
    positions = _shape(tensors, "pos_embed", 3)[1] - 1
    return {
        "image_size": patch * int(positions**0.5 + 0.5),
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_layers": _layers(tensors, "blocks"),
        "head_dim": tiny.get("head_width", EVA_HEAD_DIM),
        "intermediate_size": _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0],
        "pooling_stride": int(pooling[1]),
    }


def _language_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' configuration of the language model, from the flat one of an older version."""
    from transformers import Qwen2_5_VLConfig

    own = {name: value for name, value in config.items() if name not in OWN_KEYS and not _is_blip3o_key(name)}
    content = Qwen2_5_VLConfig(**own, dtype=config.get("torch_dtype")).to_diff_dict()
    return content | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}


def _is_blip3o_key(name: str) -> bool:
    known = ("gen_", "mm_", "tokenizer_", "tune_mm_", "freeze_mm_", "use_mm_")
    return name.startswith(known) or name in ("n_query", "image_aspect_ratio", "vision_tower_pretrained")


def _processor_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The release may lack this file: its code takes Qwen's."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        return read_json(file)
    vision = config.get("vision_config") or {}
    return NO_LIMIT_CONFIG | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.get("patch_size", 14),
        "merge_size": vision.get("spatial_merge_size", 2),
        "temporal_patch_size": vision.get("temporal_patch_size", 2),
    }
