"""Converts checkpoints between the original's layout and ours; bytes are copied chunk by chunk.

Memory stays at a few chunks for a checkpoint of any size. Names, shapes and configurations are checked before anything
is written.
"""

import importlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
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
from ..common.loading import load_tokenizer
from ..common.publishing import (
    INDEX_NAME,
    ComponentCode,
    class_code,
    require_closed,
    require_standalone,
    write_sources,
)
from ..common.safetensors_stream import LoadedTensor, TensorCopy
from ..common.weights import StoredTensor, component_tensors, main_dtype, nonfinite_names, read_json
from .original_layout import (
    DECODER,
    DECODER_VARIANT,
    Blip3oCheckpoint,
    Configs,
    original_name,
    read_original,
)
from .pipeline_blip3o import Blip3oPipeline
from .prompts_blip3o import check_tokenizer

# Component -> (file stem, class) of the components that are published with their own file.
OWN_CODE = {
    "transformer": ("transformer_blip3o", "Blip3oTransformer2DModel"),
    "vision_model": ("vision_blip3o", "EvaClipVisionModel"),
}
LIBRARY_CLASSES = {
    "language_model": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "decoder_scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "image_processor": ("transformers", "Qwen2VLImageProcessorPil"),
}
MODELS = ("transformer", "language_model", "vision_model", "unet", "vae")
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
ROOT_JSONS = ("config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors.index.json")
KEPT_FOLDER = "original"  # the JSON files of the original, kept as they were, for the way back
_DESCRIBED = "components.json"  # beside them: the component configurations that they describe


# --- to a pipeline folder ----------------------------------------------------------------------------------------------


def convert_to_diffusers(src: Path, dst: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the original checkpoint in `src` as a pipeline folder into `dst`.

    original_layout.py lists the files of `src`. `dst` must be new, empty, or left by an interrupted conversion of the
    same `src`. Weight files hold at most `shard_bytes` bytes of tensors each. Every tensor keeps its dtype and its
    bits.

    Raises:
        FileNotFoundError: `src` is not such a checkpoint.
        FileExistsError: `dst` holds something else.
        ValueError: damaged or non-finite weights, or tensors that do not fit; one error lists them all.
        OSError: there is not enough room at `dst`.
    """
    src, dst = Path(src), Path(dst)
    original = checked_original(src)
    codes = _component_codes(original.configs)
    files: dict[Path, list[TensorCopy]] = {}
    for component, tensors in original.tensors.items():
        outputs = [TensorCopy(name, stored.shape, stored) for name, stored in tensors.items()]
        stem = "model" if component == "language_model" else "diffusion_pytorch_model"
        files |= component_files(dst / component, outputs, shard_bytes, stem)
    write_weights(dst, files_fingerprint(_sources(original.tensors)), files)

    _write_configs(dst, original.configs)
    copy_files(src, dst / "language_model", ["generation_config.json"])
    copy_files(src, dst / "tokenizer", TOKENIZER_FILES)
    _keep_original(original, dst)
    require_closed(Blip3oPipeline._published_sources)
    write_sources(dst, Blip3oPipeline._published_sources, codes)
    write_json(dst / INDEX_NAME, _pipeline_index(original, read_json(src / "config.json")))
    finish(dst)


def checked_original(folder: Path) -> Blip3oCheckpoint:
    """Read an original checkpoint and compare its tensors with the models that its configurations describe.

    Raises as convert_to_diffusers; no tensor is read.
    """
    original = read_original(folder)
    raise_problems(folder, _differences(original.configs, original.tensors))
    vocabulary = _empty_model("language_model", original.configs["language_model"]).config.text_config.vocab_size
    check_tokenizer(load_tokenizer(folder, _class("tokenizer")), vocabulary)
    return original


def _sources(tensors: Mapping[str, Mapping[str, StoredTensor]]) -> list[StoredTensor]:
    return [stored for named in tensors.values() for stored in named.values()]


def _differences(configs: Configs, tensors: Mapping[str, Mapping[str, StoredTensor]]) -> list[str]:
    """One line for each tensor that is missing, unexpected or of another shape, and for each model that its
    configuration cannot build."""
    lines = []
    for component, stored in tensors.items():
        try:
            model = _empty_model(component, configs[component])
        except Exception as error:  # whatever a class makes of arguments that it does not like
            lines.append(f"{component} cannot be built: {type(error).__name__}: {error}")
            continue
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for tied in _tied(model):
            wanted.pop(tied, None)
        lines += [f"{component}: missing {name}" for name in sorted(set(wanted) - set(stored))]
        lines += [f"{component}: unexpected {name}" for name in sorted(set(stored) - set(wanted))]
        shapes = {name: stored[name].shape for name in set(stored) & set(wanted)}
        lines += [
            f"{component}: {name} is {list(shapes[name])} and must be {list(wanted[name])}"
            for name in sorted(shapes)
            if shapes[name] != wanted[name]
        ]
    return lines


def _tied(model: Any) -> list[str]:
    """Weights that a transformers model shares with its embeddings, and does not store."""
    tied = getattr(model.config, "tie_word_embeddings", False)
    return list(getattr(model, "_tied_weights_keys", None) or ()) if tied else []


def _write_configs(dst: Path, configs: Configs) -> None:
    import diffusers

    names = {
        "scheduler": "scheduler_config.json",
        "decoder_scheduler": "scheduler_config.json",
        "image_processor": "preprocessor_config.json",
    }
    for component, config in configs.items():
        (dst / component).mkdir(exist_ok=True)
        library, name = (OWN_CODE | LIBRARY_CLASSES)[component]
        if library != "transformers":
            entry: dict[str, Any] = {"_class_name": name, "_diffusers_version": diffusers.__version__}
            if component in OWN_CODE:
                entry["auto_map"] = {"AutoModel": f"{library}.{name}"}  # library is the stem of the component's file
            config = entry | config
        write_json(dst / component / names.get(component, "config.json"), config)


def _keep_original(original: Blip3oCheckpoint, dst: Path) -> None:
    kept = dst / KEPT_FOLDER
    copy_files(original.folder, kept, ROOT_JSONS)
    for file in sorted((original.folder / DECODER).rglob("*.json")):
        if not file.name.endswith(".index.json"):
            target = kept / file.relative_to(original.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    write_json(kept / _DESCRIBED, {"configs": original.configs, "eva": original.eva})


def _pipeline_index(original: Blip3oCheckpoint, config: dict[str, Any]) -> dict[str, Any]:
    import diffusers

    components: dict[str, Any] = {name: list(entry) for name, entry in (OWN_CODE | LIBRARY_CLASSES).items()}
    if "vision_model" not in original.tensors:
        components["vision_model"] = [None, None]
    return {
        "_class_name": ["pipeline", Blip3oPipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        "default_size": 1024,
        "tokenizer_max_length": config.get("tokenizer_model_max_length", 512),
        "max_references": 0,
        **components,
    }


def _component_codes(configs: Configs) -> dict[str, ComponentCode]:
    """The source files of the components that no library provides."""
    codes = {}
    for component in OWN_CODE:
        if component in configs:
            code = class_code(_model_class(component))
            assert code is not None
            require_standalone(code.text, f"{code.stem}.py")
            codes[component] = code
    return codes


# --- to the original's layout ----------------------------------------------------------------------------------------


def convert_to_original(src: Path, dst: Path) -> None:
    """Write the pipeline folder in `src` in the original's layout into `dst`; the way back of convert_to_diffusers.

    Works on converted folders and on folders with changed weights. The language model's shards and the JSON files are
    those of the original where the folder still has them and they agree with its components. The EVA tower goes into
    the checkpoint, as the original's trainer writes it, unless it came from a file of its own.

    Raises as convert_to_diffusers, and ValueError for a folder without the original's JSON files, as `save_pretrained`
    writes it.
    """
    src, dst = Path(src), Path(dst)
    if not (src / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{src} is not a pipeline folder: it has no {INDEX_NAME}.")
    needed = [component for component in MODELS if component != "vision_model"]
    if lost := [c for c in needed if not (src / c / "config.json").is_file()]:
        raise FileNotFoundError(f"{src} is not a BLIP3-o pipeline folder: it lacks {', '.join(lost)}.")
    present = [component for component in MODELS if (src / component / "config.json").is_file()]
    tensors = {component: component_tensors(src / component) for component in present}
    configs = {component: read_json(src / component / "config.json") for component in present}
    raise_problems(src, _differences(configs, tensors))
    kept = _kept(src)
    if kept is None:
        raise ValueError(
            f"{src} has no folder {KEPT_FOLDER}/ that fits its components. It holds the JSON files of the original "
            "checkpoint, and `save_pretrained` does not write it: copy it from the converted folder that the pipeline "
            "was loaded from."
        )
    if kept["eva"] == "file":
        tensors.pop("vision_model", None)
    files = _checkpoint_files(src, dst, tensors)
    for part in ("unet", "vae"):
        stem = f"diffusion_pytorch_model.{DECODER_VARIANT}"
        outputs = [TensorCopy(name, stored.shape, stored) for name, stored in tensors[part].items()]
        files[dst / DECODER / part / f"{stem}.safetensors"] = outputs
    write_weights(dst, files_fingerprint(_sources(tensors)), files)

    copy_files(src / "tokenizer", dst, TOKENIZER_FILES)
    copy_files(src / KEPT_FOLDER, dst, ROOT_JSONS[:-1])
    index, kept_index = dst / ROOT_JSONS[-1], src / KEPT_FOLDER / ROOT_JSONS[-1]
    if index.is_file() and kept_index.is_file() and _weight_map(index) == _weight_map(kept_index):
        copy_files(kept_index.parent, dst, [index.name])
    shutil.copytree(src / KEPT_FOLDER / DECODER, dst / DECODER, dirs_exist_ok=True)
    finish(dst)


def _kept(src: Path) -> dict[str, Any] | None:
    """What components.json in the kept folder says, if it describes the components as they are."""
    file = src / KEPT_FOLDER / _DESCRIBED
    if not file.is_file():
        return None
    described = read_json(file)
    for component in ("transformer", "unet", "vae"):
        now = read_json(src / component / "config.json")
        if any(now.get(name) != value for name, value in described["configs"][component].items()):
            return None
    return described


def _checkpoint_files(
    src: Path, dst: Path, tensors: Mapping[str, Mapping[str, StoredTensor]]
) -> dict[Path, list[TensorCopy]]:
    """The files of the language model checkpoint: the original's shards, if their index is kept and fits."""
    parts = [c for c in ("language_model", "transformer", "vision_model") if c in tensors]
    outputs = {
        original_name(component, name): TensorCopy(original_name(component, name), stored.shape, stored)
        for component in parts
        for name, stored in tensors[component].items()
    }
    index = src / KEPT_FOLDER / ROOT_JSONS[-1]
    weight_map = _weight_map(index) if index.is_file() else {}
    if set(weight_map) != set(outputs):
        return component_files(dst, [outputs[name] for name in sorted(outputs)], stem="model")
    files: dict[Path, list[TensorCopy]] = {}
    for name, file in weight_map.items():
        files.setdefault(dst / file, []).append(outputs[name])
    return files


def _weight_map(index: Path) -> dict[str, str]:
    return read_json(index)["weight_map"]


# --- building ----------------------------------------------------------------------------------------------------------


def components_from_original(
    directory: Path, dtype: torch.dtype | None = None, skip: Iterable[str] = ()
) -> dict[str, Any]:
    """All components of an original checkpoint by name; `vision_model` is None if there is no EVA tower.

    Weights are mapped from the files into models built without memory of their own. `dtype` defaults to the one that
    most of a component is stored in. Components named in `skip` are left out. Raises as convert_to_diffusers.
    """
    original = checked_original(Path(directory))
    skip = set(skip)
    built: dict[str, Any] = {"vision_model": None}
    for component, tensors in original.tensors.items():
        if component not in skip:
            built[component] = _build(component, original.configs[component], tensors, dtype, original.folder)
    for component in ("scheduler", "decoder_scheduler", "image_processor"):
        if component not in skip:
            cls = _class(component)
            config = original.configs[component]
            built[component] = cls(**config) if component == "image_processor" else cls.from_config(config)
    if "tokenizer" not in skip:
        built["tokenizer"] = load_tokenizer(original.folder, _class("tokenizer"))
    if "language_model" in built and (original.folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        built["language_model"].generation_config = GenerationConfig.from_pretrained(str(original.folder))
    options = _pipeline_index(original, read_json(original.folder / "config.json"))
    built["tokenizer_max_length"] = options["tokenizer_max_length"]
    return {name: value for name, value in built.items() if name not in skip}


def _class(component: str) -> Any:
    library, name = LIBRARY_CLASSES[component]
    return getattr(importlib.import_module(library), name)


def _model_class(component: str) -> Any:
    if component in OWN_CODE:
        stem, name = OWN_CODE[component]
        return getattr(importlib.import_module(f".{stem}", __package__), name)
    return _class(component)


def _new_model(component: str, config: dict[str, Any]) -> Any:
    if component == "language_model":
        from transformers import Qwen2_5_VLConfig

        return _model_class(component)(Qwen2_5_VLConfig.from_dict(dict(config)))
    return _model_class(component).from_config(config)


def _empty_model(component: str, config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return _new_model(component, config)


def _build(component: str, config: dict, tensors: Mapping[str, StoredTensor], dtype, folder: Path) -> torch.nn.Module:
    from accelerate import init_empty_weights
    from safetensors import safe_open

    dtype = dtype or main_dtype(dict(tensors))
    with init_empty_weights(include_buffers=False):
        model = _new_model(component, config)
    state: dict[str, torch.Tensor] = {}
    files = {t.file for t in tensors.values() if not isinstance(t, LoadedTensor)}
    for file in sorted(files):
        with safe_open(file, framework="pt") as handle:
            for name, stored in tensors.items():
                if stored.file == file:
                    state[name] = handle.get_tensor(stored.name).to(dtype)
    state |= {name: t.values.to(dtype) for name, t in tensors.items() if isinstance(t, LoadedTensor)}
    if bad := nonfinite_names(state.items()):
        raise ValueError(f"{folder} holds non-finite values (NaN or infinity) in {component}: {', '.join(bad)}.")
    tied = _tied(model)
    model.load_state_dict(state, strict=not tied, assign=True)
    if tied:
        model.tie_weights()
    return model.eval()
