"""Original BAGEL / Echo-4o checkpoints to diffusers folders and back, bit for bit.

Neither direction fills a model or decodes a tensor: the headers of the source say what is there, one table
(original_keys.py) says what it is called on the other side, and bytes are copied chunk by chunk into new files. Memory
stays at a few chunks for a checkpoint of any size. Names, shapes and configurations are checked before anything is
written.
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
from .original_configs import (
    JSON_FILES,
    Configs,
    component_configs,
    original_jsons,
    original_sizes,
    read_original_jsons,
    sizes_of,
)
from .original_keys import Key, all_keys, differences
from .pipeline_echo4o import Echo4oPipeline

# Component -> (file stem, class) of the components that are published with their own file.
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
KEPT_FOLDER = "original"  # the JSON files of the original, kept as they were, for the way back
_DESCRIBED = "components.json"  # beside them: the component configurations that they describe


@dataclass(frozen=True)
class Original:
    """A checked original checkpoint: its keys, where each tensor lies, and what our components are built with."""

    folder: Path
    keys: list[Key]
    tensors: dict[str, StoredTensor]  # by the original's name; the names of both weight files differ
    configs: Configs


def convert_to_diffusers(src: Path, dst: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the original checkpoint in `src` as a pipeline folder into `dst`.

    `src` holds ema.safetensors (or shards with an index), ae.safetensors, llm_config.json, vit_config.json, perhaps
    config.json, and the tokenizer's files. `dst` must be new, empty, or left by an interrupted conversion of the same
    `src`. Weight files hold at most `shard_bytes` bytes of tensors each. Every tensor keeps its dtype and its bits.

    Raises:
        FileNotFoundError: `src` is no such checkpoint.
        FileExistsError: `dst` holds something else.
        ValueError: pickled, damaged or non-finite weights, or tensors that do not fit; one error lists them all.
        OSError: there is not enough room at `dst`.
    """
    src, dst = Path(src), Path(dst)
    original = read_original(src)
    index, codes = _pipeline_index(original.configs), _component_codes()
    files: dict[Path, list[TensorCopy]] = {}
    for component in ORIGINAL_FILES:
        outputs = [
            TensorCopy(k.name, k.shape, original.tensors[k.original]) for k in original.keys if k[0] == component
        ]
        files |= component_files(dst / component, outputs, shard_bytes)
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
    """Write the pipeline folder in `src` in the original's layout into `dst`; the way back of convert_to_diffusers.

    Works on converted folders and on folders written by `save_pretrained`. The JSON files and the tokenizer's files
    are those of the original where the folder still has them and they agree with its components; else they are made
    from the components' configurations. Raises as convert_to_diffusers.
    """
    src, dst = Path(src), Path(dst)
    if not (src / INDEX_NAME).is_file():
        raise FileNotFoundError(f"{src} is no pipeline folder: it has no {INDEX_NAME}.")
    lost = [f"{c}/config.json" for c in ORIGINAL_FILES if not (src / c / "config.json").is_file()]
    if lost:
        raise FileNotFoundError(f"{src} is no BAGEL pipeline folder: it lacks {', '.join(lost)}.")
    configs = {c: read_json(src / c / "config.json") for c in ORIGINAL_FILES}
    keys = all_keys(sizes_of(configs))
    stored = {c: component_tensors(src / c) for c in ORIGINAL_FILES}
    problems: list[str] = []
    files: dict[Path, list[TensorCopy]] = {dst / name: [] for name in ORIGINAL_FILES.values()}
    for component, tensors in stored.items():
        own = [k for k in keys if k.component == component]
        problems += differences({k.name: k.shape for k in own}, tensors, f"{component}/")
        outputs = [TensorCopy(k.original, k.original_shape, tensors[k.name]) for k in own if k.name in tensors]
        files[dst / ORIGINAL_FILES[component]] += outputs
    raise_problems(src, problems)
    write_weights(dst, files_fingerprint(t for tensors in stored.values() for t in tensors.values()), files)

    _write_original_jsons(src, dst, configs, main_dtype(stored["transformer"]))
    copy_files(src / "tokenizer", dst, TOKENIZER_FILES)
    _write_vocabulary(dst)
    finish(dst)


def components_from_original(
    directory: Path, dtype: torch.dtype | None = None, skip: Iterable[str] = ()
) -> dict[str, Any]:
    """Transformer, vision model, VAE, scheduler and tokenizer of an original checkpoint, by component name.

    Weights are mapped from the files into models built without memory of their own, tensor by tensor. `dtype`
    defaults to the one that most of a component is stored in. Components named in `skip` are left out. Raises as
    convert_to_diffusers.
    """
    original = read_original(Path(directory))
    skip = set(skip)
    built: dict[str, Any] = {}
    for component in ORIGINAL_FILES:
        if component not in skip:
            built[component] = _build(component, original, dtype)
    if "scheduler" not in skip:
        from diffusers import FlowMatchEulerDiscreteScheduler

        built["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(_scheduler_config())
    if "tokenizer" not in skip:
        from transformers import Qwen2Tokenizer

        built["tokenizer"] = Qwen2Tokenizer.from_pretrained(str(original.folder))
    return built


def read_original(folder: Path) -> Original:
    """Read the headers and JSON files of an original checkpoint and check them against each other.

    Raises as convert_to_diffusers; no tensor is read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    ema = _original_weights(folder)
    llm, vit, config = read_original_jsons(folder)
    if not (folder / "ae.safetensors").is_file():
        refuse_pickles(folder, "ae.*")
        raise FileNotFoundError(f"{folder} is no original BAGEL checkpoint: it lacks ae.safetensors.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileNotFoundError(f"{folder} is no original BAGEL checkpoint: it lacks the tokenizer's files.")
    ae = read_header(folder / "ae.safetensors")
    sizes, problems = original_sizes(llm, vit, config, ema, ae)
    configs = component_configs(llm, vit, config, sizes, problems)
    keys = all_keys(sizes)
    for where, tensors in (("ema.safetensors", ema), ("ae.safetensors", ae)):
        expected = {k.original: k.original_shape for k in keys if ORIGINAL_FILES[k.component] == where}
        problems += differences(expected, tensors, where)
    raise_problems(folder, problems)
    raise_problems(folder, _what_cannot_be_built(configs))
    return Original(folder, keys, {**ema, **ae}, configs)


def _what_cannot_be_built(configs: Configs) -> list[str]:
    """One line for each component whose class refuses its arguments; nothing is allocated."""
    lines = []
    for component, arguments in configs.items():
        try:
            with torch.device("meta"):
                _model_class(component)(**arguments)
        except Exception as error:  # whatever a class makes of arguments that it does not like
            lines.append(f"{component} cannot be built: {type(error).__name__}: {error}")
    return lines


def _original_weights(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of ema.safetensors, or of the shards that the folder's only index names."""
    if (folder / "ema.safetensors").is_file():
        return read_header(folder / "ema.safetensors")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ValueError(f"{folder} has several weight indexes ({', '.join(i.name for i in indexes)}); keep one.")
    if not indexes:
        if not any(f.name != "ae.safetensors" for f in folder.glob("*.safetensors")):
            refuse_pickles(folder)
        raise FileNotFoundError(
            f"{folder} is no original BAGEL checkpoint: it has neither ema.safetensors nor a *.safetensors.index.json."
        )
    return indexed_tensors(indexes[0])


# --- our folder ----------------------------------------------------------------------------------------------------


def _class_entry(component: str) -> dict[str, str]:
    import diffusers

    return {"_class_name": CLASS_NAMES[component], "_diffusers_version": diffusers.__version__}


def _scheduler_config() -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return json.loads(FlowMatchEulerDiscreteScheduler(shift=3.0).to_json_string())


@dataclass
class _StandIn:
    config: SimpleNamespace


def _pipeline_index(configs: Configs) -> dict[str, Any]:
    """model_index.json, with the pipeline's presets and limits written out so that they can be seen and changed."""
    # The pipeline derives limits from its components' configurations and from nothing else of them.
    stand_ins = {name: _StandIn(SimpleNamespace(**config)) for name, config in configs.items()}
    settings = dict(Echo4oPipeline(**stand_ins, scheduler=None, tokenizer=None).config)
    components = {name: list(entry) for name, entry in (OWN_CODE | LIBRARY_CLASSES).items()}
    parameters = inspect.signature(Echo4oPipeline.__init__).parameters
    presets = {name: settings[name] for name in parameters if name in settings and name not in components}
    version = _class_entry("vae")["_diffusers_version"]
    index = {"_class_name": ["pipeline", Echo4oPipeline.__name__], "_diffusers_version": version}
    return index | components | presets


def _component_codes() -> dict[str, ComponentCode]:
    """The source files of the components that no library provides."""
    codes = {component: class_code(_model_class(component)) for component in OWN_CODE}
    for code in codes.values():
        require_standalone(code.text, f"{code.stem}.py")
    return codes


def _write_original_jsons(src: Path, dst: Path, configs: Configs, dtype: torch.dtype | None) -> None:
    kept = src / KEPT_FOLDER
    # Components changed since would make the kept files lie about them.
    if (kept / _DESCRIBED).is_file() and read_json(kept / _DESCRIBED) == _plain_configs(configs):
        copy_files(kept, dst, JSON_FILES)
        return
    file = src / "tokenizer" / "tokenizer.json"
    added = read_json(file).get("added_tokens", []) if file.is_file() else []
    name = str(dtype or torch.float32).removeprefix("torch.")
    for file_name, content in original_jsons(configs, name, {t["content"]: t["id"] for t in added}).items():
        write_json(dst / file_name, content)


def _plain_configs(configs: Configs) -> Configs:
    return {c: {k: v for k, v in config.items() if not k.startswith("_")} for c, config in configs.items()}


def _write_vocabulary(dst: Path) -> None:
    """vocab.json and merges.txt, which the original's tokenizer class reads, from tokenizer.json."""
    if (dst / "vocab.json").is_file() or not (dst / "tokenizer.json").is_file():
        return
    model = read_json(dst / "tokenizer.json")["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (dst / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), "utf-8")
    (dst / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")


# --- building ------------------------------------------------------------------------------------------------------


def _build(component: str, original: Original, dtype: torch.dtype | None) -> torch.nn.Module:
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
