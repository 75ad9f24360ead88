"""Converts BAGEL and Echo-4o checkpoints from the original layout to pipeline folders and back, bit for bit.

Both directions copy the bytes of tensors chunk by chunk under the names of the other layout (original_keys.py), without
building a model, so that memory does not grow with the checkpoint. Names, shapes and configurations are checked before
anything is written.
"""

import importlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..common.conversion import (
    SHARD_BYTES,
    component_files,
    copy_files,
    files_fingerprint,
    finish,
    raise_problems,
    write_json,
    write_weights,
)
from ..common.images import vae_scale_factor
from ..common.loading import load_tokenizer
from ..common.publishing import (
    INDEX_NAME,
    ComponentCode,
    class_code,
    require_closed,
    require_standalone,
    write_sources,
)
from ..common.safetensors_stream import TensorCopy
from ..common.weights import (
    StoredTensor,
    component_tensors,
    indexed_tensors,
    main_dtype,
    nonfinite_names,
    read_header,
    read_json,
    refuse_pickles,
)
from .options_bagel import read_options
from .original_configs import (
    JSON_FILES,
    Configs,
    component_configs,
    original_jsons,
    original_sizes,
    read_original_jsons,
    sizes_of,
)
from .original_keys import TensorEntry, all_keys, differences
from .pipeline_echo4o import Echo4oPipeline
from .segments_bagel import check_tokenizer

# Component -> (file stem, class) of the components whose source file is published with them.
OWN_CODE = {
    "transformer": ("transformer_bagel", "BagelTransformer2DModel"),
    "vision_model": ("vision_bagel", "BagelVisionModel"),
}
LIBRARY_CLASSES = {
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
}
CLASS_NAMES = {name: code[1] for name, code in (OWN_CODE | LIBRARY_CLASSES).items()}
ORIGINAL_FILES = {"transformer": "ema.safetensors", "vision_model": "ema.safetensors", "vae": "ae.safetensors"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
KEPT_FOLDER = "original"  # holds the original JSON files, for the conversion back
_DESCRIBED = "components.json"  # in this folder: the component configurations that the JSON files describe


@dataclass(frozen=True)
class BagelCheckpoint:
    """A checked original checkpoint: its keys, its stored tensors, and the configurations of our components."""

    folder: Path
    keys: list[TensorEntry]
    tensors: dict[str, StoredTensor]  # by original name; no name is in both weight files
    configs: Configs


def convert_to_diffusers(src: Path, dst: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Convert an original checkpoint to a pipeline folder. Every tensor keeps its dtype and its bits.

    Args:
        src: folder with ema.safetensors (or shards with an index), ae.safetensors, llm_config.json, vit_config.json,
            the tokenizer's files and optionally config.json.
        dst: folder to write: new, empty, or left by an interrupted conversion of the same `src`.
        shard_bytes: largest number of tensor bytes per weight file.

    Raises:
        FileNotFoundError: `src` is not an original checkpoint.
        FileExistsError: `dst` contains something else.
        ValueError: weights are pickled, damaged or non-finite, or tensors do not fit; one error lists all problems.
        OSError: there is not enough space at `dst`.
    """
    src, dst = Path(src), Path(dst)
    original = read_original(src)
    index, codes = _pipeline_index(original.configs), _component_codes()
    files: dict[Path, list[TensorCopy]] = {}
    for component in ORIGINAL_FILES:
        own = [key for key in original.keys if key.component == component]
        copies = [TensorCopy(key.name, key.shape, original.tensors[key.original]) for key in own]
        files |= component_files(dst / component, copies, shard_bytes)
    write_weights(dst, files_fingerprint(original.tensors.values()), files)

    for component, config in original.configs.items():
        write_json(dst / component / "config.json", _class_entry(component) | config)
    (dst / "scheduler").mkdir(exist_ok=True)
    write_json(dst / "scheduler" / "scheduler_config.json", _scheduler_config())
    copy_files(src, dst / "tokenizer", TOKENIZER_FILES)
    copy_files(src, dst / KEPT_FOLDER, JSON_FILES)
    write_json(dst / KEPT_FOLDER / _DESCRIBED, original.configs)
    require_closed(Echo4oPipeline._published_sources)
    write_sources(dst, Echo4oPipeline._published_sources, codes)
    write_json(dst / INDEX_NAME, index)
    finish(dst)


def convert_to_original(src: Path, dst: Path) -> None:
    """Convert a pipeline folder to the original layout; the inverse of convert_to_diffusers.

    Converts folders that were converted before and folders written by `save_pretrained`. JSON and tokenizer files are
    copied from the folder if it still has the original ones and they describe its components. Otherwise they are made
    from the components' configurations. Raises the same errors as convert_to_diffusers.
    """
    src, dst = Path(src), Path(dst)
    if not (src / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{src} is not a pipeline folder: it has no {INDEX_NAME}.")
    missing = [f"{c}/config.json" for c in ORIGINAL_FILES if not (src / c / "config.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{src} is not a BAGEL pipeline folder: it lacks {', '.join(missing)}.")
    configs = {c: read_json(src / c / "config.json") for c in ORIGINAL_FILES}
    keys = all_keys(sizes_of(configs))
    stored = {c: component_tensors(src / c) for c in ORIGINAL_FILES}
    problems: list[str] = []
    files: dict[Path, list[TensorCopy]] = {dst / name: [] for name in ORIGINAL_FILES.values()}
    for component, tensors in stored.items():
        own = [k for k in keys if k.component == component]
        problems += differences({k.name: k.shape for k in own}, tensors, f"{component}/")
        copies = [TensorCopy(k.original, k.original_shape, tensors[k.name]) for k in own if k.name in tensors]
        files[dst / ORIGINAL_FILES[component]] += copies
    raise_problems(src, problems)
    write_weights(dst, files_fingerprint(t for tensors in stored.values() for t in tensors.values()), files)

    _write_original_jsons(src, dst, configs, main_dtype(stored["transformer"]))
    copy_files(src / "tokenizer", dst, TOKENIZER_FILES)
    _write_vocabulary(dst)
    finish(dst)


def components_from_original(
    directory: Path, dtype: torch.dtype | None = None, skip: Iterable[str] = ()
) -> dict[str, Any]:
    """Load transformer, vision model, VAE, scheduler and tokenizer of an original checkpoint, by component name.

    Args:
        directory: folder in the original layout.
        dtype: of the weights; None: the dtype that most bytes of each component are stored in.
        skip: components that are not loaded.

    Raises the same errors as convert_to_diffusers.
    """
    original = read_original(Path(directory))
    skip = set(skip)
    built: dict[str, Any] = {}
    for component in ORIGINAL_FILES:
        if component not in skip:
            built[component] = _build(component, original, dtype)
    if "scheduler" not in skip:
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        built["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(_scheduler_config())
    if "tokenizer" not in skip:
        built["tokenizer"] = _tokenizer(original.folder)
    return built


def read_original(folder: Path) -> BagelCheckpoint:
    """Read and check the headers and JSON files of an original checkpoint, without reading tensors.

    Raises the same errors as convert_to_diffusers.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    ema = _original_weights(folder)
    llm, vit, config = read_original_jsons(folder)
    if not (folder / "ae.safetensors").is_file():
        refuse_pickles(folder, "ae.*")
        raise FileNotFoundError(f"{folder} is not an original BAGEL checkpoint: it lacks ae.safetensors.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{folder} is not an original BAGEL checkpoint: it lacks the tokenizer's files.")
    ae = read_header(folder / "ae.safetensors")
    sizes, problems = original_sizes(llm, vit, config, ema, ae)
    configs = component_configs(llm, vit, config, sizes, problems)
    keys = all_keys(sizes)
    for where, tensors in (("ema.safetensors", ema), ("ae.safetensors", ae)):
        expected = {k.original: k.original_shape for k in keys if ORIGINAL_FILES[k.component] == where}
        problems += differences(expected, tensors, where)
    raise_problems(folder, problems)
    raise_problems(folder, _invalid_components(configs))
    check_tokenizer(_tokenizer(folder), sizes.vocabulary)
    return BagelCheckpoint(folder, keys, {**ema, **ae}, configs)


def _tokenizer(folder: Path) -> Any:
    from transformers import Qwen2Tokenizer

    return load_tokenizer(folder, Qwen2Tokenizer)


def _invalid_components(configs: Configs) -> list[str]:
    """One line per component whose class does not accept its arguments; no weights are allocated."""
    lines = []
    for component, arguments in configs.items():
        try:
            with torch.device("meta"):
                _model_class(component)(**arguments)
        except Exception as error:  # classes raise errors of any type for invalid arguments
            lines.append(f"{component} cannot be built: {type(error).__name__}: {error}")
    return lines


def _original_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of ema.safetensors, or of the shards of the folder's index, which may name those of the VAE, too."""
    if (folder / "ema.safetensors").is_file():
        return read_header(folder / "ema.safetensors")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(f"{folder} has several weight indexes ({', '.join(i.name for i in indexes)}); keep one.")
    if not indexes:
        if not any(f.name != "ae.safetensors" for f in folder.glob("*.safetensors")):
            refuse_pickles(folder)
        raise FileNotFoundError(
            f"{folder} is not an original BAGEL checkpoint: it has neither ema.safetensors nor a *.safetensors.index.json."
        )
    return {name: t for name, t in indexed_tensors(indexes[0]).items() if t.file.name != "ae.safetensors"}


# --- parts of the folders --------------------------------------------------------------------------------------------


def _class_entry(component: str) -> dict[str, Any]:
    from diffusers import __version__

    entry: dict[str, Any] = {"_class_name": CLASS_NAMES[component], "_diffusers_version": __version__}
    if component in OWN_CODE:
        stem, name = OWN_CODE[component]
        entry["auto_map"] = {"AutoModel": f"{stem}.{name}"}
    return entry


def _scheduler_config() -> dict[str, Any]:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return json.loads(FlowMatchEulerDiscreteScheduler(shift=3.0).to_json_string())


def _pipeline_index(configs: Configs) -> dict[str, Any]:
    """model_index.json with all presets and limits, so that users can see and change them."""
    transformer, vision = configs["transformer"], configs["vision_model"]
    stride = vae_scale_factor(SimpleNamespace(**configs["vae"])) * transformer["latent_patch_size"]
    parameters = inspect.signature(Echo4oPipeline.__init__).parameters
    settings = read_options(
        presets=None,
        think_prompts=None,
        vae_image_limits=None,
        vision_image_limits=None,
        max_references=parameters["max_references"].default,
        vae_table=(transformer["max_latent_size"], stride),
        vision_table=(vision["max_patches_per_side"], vision["patch_size"]),
    )
    classes = {name: list(entry) for name, entry in (OWN_CODE | LIBRARY_CLASSES).items()}
    options = {name: settings[name] for name in parameters if name in settings and name not in classes}
    version = _class_entry("vae")["_diffusers_version"]
    index = {"_class_name": ["pipeline", Echo4oPipeline.__name__], "_diffusers_version": version}
    return index | classes | options


def _component_codes() -> dict[str, ComponentCode]:
    """The source files of the components whose classes no library provides."""
    codes = {}
    for component in OWN_CODE:
        code = class_code(_model_class(component))
        assert code is not None
        require_standalone(code.text, f"{code.stem}.py")
        codes[component] = code
    return codes


def _write_original_jsons(src: Path, dst: Path, configs: Configs, dtype: torch.dtype | None) -> None:
    kept = src / KEPT_FOLDER
    # The files may describe an earlier state of the components.
    if (kept / _DESCRIBED).is_file() and read_json(kept / _DESCRIBED) == _plain_configs(configs):
        copy_files(kept, dst, JSON_FILES)
        return
    file = src / "tokenizer" / "tokenizer.json"
    added = read_json(file).get("added_tokens", []) if file.is_file() else []
    name = str(dtype or torch.float32).removeprefix("torch.")
    for file_name, content in original_jsons(configs, name, {t["content"]: t["id"] for t in added}).items():
        write_json(dst / file_name, content)


def _plain_configs(configs: Configs) -> Configs:
    return {
        c: {k: v for k, v in config.items() if k != "auto_map" and not k.startswith("_")}
        for c, config in configs.items()
    }


def _write_vocabulary(dst: Path) -> None:
    """Write vocab.json and merges.txt, which the original's tokenizer class reads, from tokenizer.json."""
    if (dst / "vocab.json").is_file() or not (dst / "tokenizer.json").is_file():
        return
    model = read_json(dst / "tokenizer.json")["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (dst / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    (dst / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")


# --- building ------------------------------------------------------------------------------------------------------


def _build(component: str, original: BagelCheckpoint, dtype: torch.dtype | None) -> torch.nn.Module:
    from accelerate import init_empty_weights
    from safetensors import safe_open

    keys = [k for k in original.keys if k.component == component]
    stored = {k.name: original.tensors[k.original] for k in keys}
    dtype = dtype or main_dtype(stored)
    with init_empty_weights():
        model = _model_class(component)(**original.configs[component])
    state: dict[str, torch.Tensor] = {}
    for file in sorted({t.file for t in stored.values()}):
        with safe_open(file, framework="pt") as handle:
            for key in keys:
                if stored[key.name].file == file:
                    tensor = handle.get_tensor(key.original).reshape(key.shape)
                    state[key.name] = tensor.to(dtype)
    if bad := nonfinite_names(state.items()):
        raise ValueError(
            f"{original.folder} holds non-finite values (NaN or infinity) in {component}: {', '.join(bad)}."
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _model_class(component: str) -> type[torch.nn.Module]:
    if component in OWN_CODE:
        stem, name = OWN_CODE[component]
        return getattr(importlib.import_module(f".{stem}", __package__), name)
    return getattr(importlib.import_module("diffusers"), CLASS_NAMES[component])
